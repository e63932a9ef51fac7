from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from refold.conversion.convert import convert
from refold.engine.opening import open_model
from refold.errors import FolderError, RefoldError, SourceError
from refold.families.registry import FAMILIES
from refold.modeling.load import computes_fast, stored_dtype
from refold.modeling.model import RefoldForCausalLM

TOKENS = torch.randint(2, 95, (2, 24), generator=torch.Generator().manual_seed(7))
VARIANTS = (
    *("llama", "llama-mha-bias", "llama-mqa-mlp-bias", "llama-linear", "llama-llama3", "llama-v4", "llama-yarn"),
    *("llama-dynamic", "mistral-window", "mistral-full", "mistral-head-dim"),
    *("gpt_neox", "gpt_neox-sequential", "gpt_neox-v4", "gpt_neox-tied", "gpt_neox-yarn"),
    *("qwen2", "qwen2-window", "qwen3", "qwen3-window", "gemma", "gemma-bias", "gemma2", "gemma2-v4"),
    *("gemma3_text", "gemma3_text-v4", "olmo2", "olmo2-bias", "phi3", "phi3-window"),
)
# As a share of the largest logit.
TOLERANCE = 2e-5


def _theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def _difference(ours: Any, theirs: Any) -> float:
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        return float((ours(TOKENS).logits - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_opened_source_gives_transformers_logits(make_source, variant: str):
    folder = make_source(variant)
    model = open_model(folder, device="cpu")
    assert isinstance(model, RefoldForCausalLM)
    assert not model.training
    assert _difference(model, _theirs(folder)) < TOLERANCE


def test_every_family_is_among_them():
    assert {variant.split("-")[0] for variant in VARIANTS} == set(FAMILIES) - {"gemma3"}


def test_an_exchanged_layer_is_seen(make_source):
    model: Any = open_model(make_source("llama"), device="cpu")
    mixers = model.model.mixers
    with torch.no_grad():
        mixers[0].q_proj.weight, mixers[1].q_proj.weight = mixers[1].q_proj.weight, mixers[0].q_proj.weight
    assert _difference(model, _theirs(make_source("llama"))) > 100 * TOLERANCE


def test_a_tied_head_is_the_embedding_and_takes_no_second_copy(make_source):
    folder = make_source("llama-mqa-mlp-bias")
    model: Any = open_model(folder, device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert _difference(model, _theirs(folder)) < TOLERANCE
    untied: Any = open_model(make_source("llama"), device="cpu")
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_nothing_is_written(make_source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    folder = make_source("gpt_neox")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.chdir(tmp_path)
    open_model(folder, device="cpu")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == []


def test_dtypes_are_those_of_load_model(make_source):
    folder = make_source("llama", dtype="bfloat16")
    plain = open_model(folder, device="cpu")
    assert stored_dtype(plain) == torch.bfloat16
    assert (plain.dtype == torch.bfloat16) == computes_fast(torch.bfloat16, torch.device("cpu"))
    wide: Any = open_model(folder, dtype="float32", device="cpu")
    assert wide.dtype == torch.float32
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert _difference(wide, theirs) < TOLERANCE
    assert open_model(folder, dtype="bfloat16", device="cpu").dtype == torch.bfloat16


def test_a_folded_folder_loads_as_it_is(make_source, tmp_path: Path):
    convert(make_source("llama"), tmp_path / "out", {"fold": {"loops": 2}, "relax": {"rank": 4}})
    model: Any = open_model(tmp_path / "out", device="cpu")
    assert len(model.model.mixers) == 2
    assert model.config.num_hidden_layers == 4
    assert open_model(model) is model


def test_end_tokens_of_the_folder_are_kept(make_source, tmp_path: Path):
    for file in make_source("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert open_model(tmp_path, device="cpu").generation_config.eos_token_id == [7, 9]  # pyright: ignore[reportOptionalMemberAccess]


def test_wrong_models_are_refused(make_source, tmp_path: Path):
    loaded = LlamaForCausalLM.from_pretrained(make_source("llama"))
    with pytest.raises(RefoldError, match=r"model: a folder, a hub id or a folded model is required \(got a loaded Ll"):
        open_model(loaded)
    model = open_model(make_source("llama"), device="cpu")
    with pytest.raises(RefoldError, match="dtype: only a model loaded from a folder can be given one"):
        open_model(model, dtype="float32")
    with pytest.raises(RefoldError, match="device: only a model loaded from a folder can be given one"):
        open_model(model, device="cpu")
    with pytest.raises((SourceError, FolderError)):
        open_model(tmp_path / "nothing")
    for file in make_source("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        open_model(tmp_path, device="cpu")


def test_real_models_are_the_same(material):
    for name in ("stories260K", "TinyStories-656K", "books-10m"):
        folder = material / "models" / name
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert _difference(open_model(folder, dtype="float32", device="cpu"), theirs) < TOLERANCE
