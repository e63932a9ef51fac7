"""Conversions with a cut vocabulary: exact rows, mapped ids, and later stages and exports without a special case."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refold.checkpoint.folded_tensors import read_blueprint
from refold.conversion.convert import ConvertOptions, convert
from refold.conversion.inspect import inspect
from refold.conversion.quantise import quantise
from refold.errors import RecipeError, SourceError
from refold.exporting.export import export
from refold.modeling.load import load_model, load_tokenizer
from refold.planning.plan import plan
from refold.vocabulary.kept_tokens import KeptTokens, read_kept_tokens
from refold.vocabulary.tokenizer_file import TokenizerFile

TEXT = ["The sea was calm that night, and the moon lay on it. " * 16, "It was the best of times. " * 16]
CUT = {"vocabulary": {"multiple": 4}}
OPTIONS = ConvertOptions(allow_larger=True)
RECIPES = {
    "plain": {},
    "folded": {"fold": {"loops": 2}, "relax": {"rank": 4, "init": "svd", "weight": "activations"}},
    "factored": {"factor": {"parameters": 0.8}, "calibration": {"tokens": 128, "context": 16, "order": "sequential"}},
    "mixed": {"mixers": [{"type": "linear_attention", "depths": [1], "fit": "none"}]},
    "fresh": {"weights": "fresh"},
}


@pytest.fixture(scope="module")
def source(make_model, tmp_path_factory) -> Path:
    """A source whose special tokens have ids that a cut changes, and with a slow tokenizer's files."""
    folder = tmp_path_factory.mktemp("named") / "source"
    shutil.copytree(make_model(), folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    last = max(raw["model"]["vocab"].values())
    swapped = {token: {2: last, last: 2}.get(each, each) for token, each in raw["model"]["vocab"].items()}
    raw["model"]["vocab"] = swapped
    for token in raw["added_tokens"]:
        token["id"] = swapped[token["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    for name in ("config.json", "generation_config.json"):
        found = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**found, "eos_token_id": last, "bos_token_id": 1}))
    (folder / "vocab.json").write_text(json.dumps(swapped))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def cut(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cut") / "model"
    convert(source, out, CUT, options=OPTIONS, calibration=TEXT)
    return out


def kept_of(folder: Path) -> KeptTokens:
    kept = read_kept_tokens(folder)
    assert kept is not None
    return kept


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, device="cpu", dtype="float32")(ids).logits


def test_logits_of_kept_tokens_are_those_of_the_source_bit_for_bit(source, cut):
    kept, tokenizer = kept_of(cut), load_tokenizer(cut)
    assert kept.size % 4 == 0
    assert kept.size < kept.source_size
    ids = torch.tensor([tokenizer(TEXT[0])["input_ids"][:40]])
    assert kept.to_source(ids).tolist() == [load_tokenizer(source)(TEXT[0])["input_ids"][:40]]
    whole = logits(source, kept.to_source(ids))
    assert torch.equal(logits(cut, ids), whole[..., torch.from_numpy(kept.ids)])


def test_control_ids_that_are_not_mapped_give_other_logits(source, cut):
    size = kept_of(cut).size
    ids = torch.arange(size - 20, size)[None]
    assert not torch.allclose(logits(cut, ids), logits(source, ids)[..., :size], atol=0.1)


@pytest.mark.parametrize("variant", ["gemma3_text", "gpt_neox", "qwen2-window"])
def test_other_families_are_cut_as_exactly(variant, make_model, tmp_path):
    source = make_model(variant)
    convert(source, tmp_path / "cut", CUT, options=OPTIONS, calibration=TEXT)
    kept, ids = kept_of(tmp_path / "cut"), torch.arange(12)[None]
    whole = logits(source, kept.to_source(ids))
    assert torch.equal(logits(tmp_path / "cut", ids), whole[..., torch.from_numpy(kept.ids)])


def test_special_tokens_are_mapped_everywhere(source, cut):
    kept, raw = kept_of(cut), json.loads((cut / "config.json").read_text())
    last = kept.numbers[299]
    assert last < 299
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["vocab_size"]) == (1, last, kept.size)
    assert json.loads((cut / "generation_config.json").read_text())["eos_token_id"] == last
    tokenizer = load_tokenizer(cut)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", last)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "it"}], tokenize=False) == "it</s>"
    assert not (cut / "vocab.json").exists()
    assert (source / "vocab.json").exists()


def test_every_text_decodes_as_before(source, cut, sentences):
    old, new = load_tokenizer(source), load_tokenizer(cut)
    for text in sentences:
        ids = new(text, add_special_tokens=False)["input_ids"]
        assert new.decode(ids, clean_up_tokenization_spaces=False) == text
        assert len(ids) >= len(old(text, add_special_tokens=False)["input_ids"])


def test_the_plan_is_pending_before_and_exact_after(source, cut, tmp_path):
    draft = plan(source, CUT)
    assert [note.text for note in draft.pending] == [
        "vocabulary: tokens are chosen during conversion (tokens that the text has at least once); this plan assumes "
        "all 300"
    ]
    assert draft.calibration == "required"
    assert draft.blueprint.arch.vocab_size == 300
    made = convert(source, tmp_path / "again", CUT, options=OPTIONS, calibration=TEXT)
    size = kept_of(cut).size
    assert made.blueprint.arch.vocab_size == size
    assert not any("chosen during conversion" in note.text for note in made.notes)
    assert any(note.text.startswith(f"vocabulary: {size} of 300 tokens are kept") for note in made.notes)
    saved = made.cost.source.weight_bytes - made.cost.target.weight_bytes
    assert saved == 2 * (300 - size) * 32 * 4
    assert made.cost.target.flops_per_token < made.cost.source.flops_per_token
    for name in ("model.safetensors", "kept_tokens.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (cut / name).read_bytes()


@pytest.mark.parametrize("name", RECIPES)
def test_other_methods_work_beside_it(name, source, tmp_path, cut):
    text = None if name in ("plain", "fresh") else TEXT
    convert(source, tmp_path / "whole", RECIPES[name], options=OPTIONS, calibration=text)
    convert(source, tmp_path / "cut", {**RECIPES[name], **CUT}, options=OPTIONS, calibration=TEXT)
    kept, ids = kept_of(tmp_path / "cut"), torch.arange(20)[None]
    whole, found = logits(tmp_path / "whole", kept.to_source(ids)), logits(tmp_path / "cut", ids)
    if name == "fresh":
        assert found.shape == (1, 20, kept.size)
        return
    # What is fitted does not depend on the rows that are kept.
    assert torch.equal(found, whole[..., torch.from_numpy(kept.ids)])


def test_weights_are_rounded_on_text_in_kept_tokens(source, cut, tmp_path):
    # With `least: 17` the calibration text has tokens that are dropped.
    recipe = {
        "vocabulary": {"least": 17, "multiple": 1},
        "quantise": {"to": "int8"},
        "calibration": {"tokens": 64, "context": 16},
    }
    convert(source, tmp_path / "few", recipe, options=OPTIONS, calibration=TEXT)
    assert kept_of(tmp_path / "few").size < kept_of(cut).size
    ids = torch.arange(20)[None]
    quantise(cut, tmp_path / "int8", "int8", data=TEXT, tokens=64)
    assert kept_of(tmp_path / "int8").ids.tolist() == kept_of(cut).ids.tolist()
    for folder in ("few", "int8"):
        kept = kept_of(tmp_path / folder)
        whole = logits(source, kept.to_source(ids))[..., torch.from_numpy(kept.ids)]
        gap = (logits(tmp_path / folder, ids) - whole).abs().max() / whole.abs().max()
        assert 0 < gap < 0.3


def test_a_list_needs_no_text(source, cut, tmp_path):
    recipe = {"vocabulary": {"keep": str(cut / "kept_tokens.json"), "multiple": 4}}
    convert(source, tmp_path / "cut", recipe, options=OPTIONS)
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match="this recipe does not use calibration text"):
        convert(source, tmp_path / "other", recipe, options=OPTIONS, calibration=TEXT)


def test_inspect_tells_the_tokens(cut, capsys):
    from refold.cli.inspect_tables import print_inspection

    found, size = inspect(cut), kept_of(cut).size
    assert (found.source_vocabulary, found.blueprint.arch.vocab_size) == (300, size)
    assert found.cost.source.weight_bytes - found.cost.target.weight_bytes == 2 * (300 - size) * 32 * 4
    print_inspection(found)
    assert f"{size}" in next(line for line in capsys.readouterr().out.splitlines() if "tokens" in line)


def test_a_dense_export_runs_in_transformers(source, cut, tmp_path):
    export(cut, tmp_path / "dense", "dense")
    kept, ids = kept_of(tmp_path / "dense"), torch.arange(20)[None]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert type(stock).__name__ == "LlamaForCausalLM"
    assert stock.config.vocab_size == kept.size
    assert stock.config.eos_token_id == stock.generation_config.eos_token_id == kept.numbers[299]
    with torch.no_grad():
        found = stock(ids).logits
    assert torch.allclose(found, logits(source, kept.to_source(ids))[..., torch.from_numpy(kept.ids)], atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "dense").get_vocab() == load_tokenizer(cut).get_vocab()


@pytest.mark.long
def test_a_hub_export_runs_its_own_code(source, cut, tmp_path):
    export(cut, tmp_path / "hub", "hub")
    kept, ids = kept_of(cut), torch.arange(20)[None]
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(made(ids).logits, logits(source, kept.to_source(ids))[..., torch.from_numpy(kept.ids)])


def test_an_onnx_export_has_the_small_head(source, cut, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    export(cut, tmp_path / "onnx", "onnx")
    file = next((tmp_path / "onnx").rglob("*.onnx"))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    shape = next(each.shape for each in session.get_outputs() if each.name == "logits")
    assert shape[-1] == kept_of(cut).size


def test_a_gguf_source_is_cut_too(source, tmp_path):
    pytest.importorskip("gguf")
    export(source, tmp_path / "source.gguf", "gguf")
    convert(tmp_path / "source.gguf", tmp_path / "cut", CUT, options=OPTIONS, calibration=TEXT)
    kept, ids = kept_of(tmp_path / "cut"), torch.arange(20)[None]
    whole = logits(tmp_path / "source.gguf", kept.to_source(ids))
    assert torch.equal(logits(tmp_path / "cut", ids), whole[..., torch.from_numpy(kept.ids)])
    export(tmp_path / "cut", tmp_path / "cut.gguf", "gguf")
    assert (tmp_path / "cut.gguf").stat().st_size < (tmp_path / "source.gguf").stat().st_size


def test_conversion_without_text_is_refused(source, tmp_path):
    with pytest.raises(RecipeError, match=r"vocabulary.keep: calibration text is required for `used`"):
        convert(source, tmp_path / "out", CUT)
    assert not (tmp_path / "out").exists()


def test_a_source_without_tokenizer_json_is_refused(source, tmp_path):
    slow = tmp_path / "slow"
    shutil.copytree(source, slow)
    (slow / "tokenizer.json").unlink()
    (slow / "merges.txt").write_text("#version: 0.2\n")
    recipe = {"vocabulary": {"keep": str(tmp_path / "list.txt")}}
    (tmp_path / "list.txt").write_text("a\n")
    with pytest.raises(SourceError, match=r"a source with tokenizer.json is required .got a slow tokenizer"):
        convert(slow, tmp_path / "out", recipe)


def test_a_tokenizer_that_is_rebuilt_otherwise_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(TokenizerFile, "cut", lambda self, numbers: self.raw)
    with pytest.raises(SourceError, match="a tokenizer that transformers loads as it is written is required"):
        convert(source, tmp_path / "out", CUT, options=OPTIONS, calibration=TEXT)


def test_the_blueprint_on_disk_has_the_small_vocabulary(cut):
    blueprint = read_blueprint(str(cut), json.loads((cut / "config.json").read_text()))
    assert blueprint.arch.vocab_size == kept_of(cut).size == len(np.unique(kept_of(cut).ids))
