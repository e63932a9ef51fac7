import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refold.checkpoint import provenance
from refold.checkpoint.gguf.source import GgufSource
from refold.checkpoint.locate import is_same_source, locate
from refold.checkpoint.reader import CheckpointReader
from refold.conversion.convert import convert
from refold.errors import SourceError
from refold.families.registry import read_arch
from refold.modeling.load import load_model, load_tokenizer
from refold.sources.source_model import read_source_model

SILU, GELU = {"hidden_act": "silu"}, {"hidden_act": "gelu"}
HEAD = {"query_pre_attn_scalar": 16}
EXPRESSIBLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-bias": ("llama-mha-bias", SILU),
    "llama-mqa-mlp-bias": ("llama-mqa-mlp-bias", {}),
    "llama-linear": ("llama-linear", {}),
    "llama-llama3": ("llama-llama3", SILU),
    "llama-yarn": ("llama-yarn", {}),
    "mistral-window": ("mistral-window", {}),
    "mistral-head-dim": ("mistral-head-dim", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-sequential": ("gpt_neox-sequential", {}),
    "gpt_neox-tied": ("gpt_neox-tied", GELU),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", HEAD),
    "gemma3_text": ("gemma3_text", HEAD),
    "gemma3_text-v4": ("gemma3_text-v4", HEAD),
    "olmo2": ("olmo2", {}),
    "olmo2-bias": ("olmo2-bias", {}),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3-window", {}),
}
"""Variants whose properties llama.cpp's metadata can express."""


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_a_file_gives_the_model_it_was_made_of(
    name: str, make_source: Callable[..., Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    variant, fields = EXPRESSIBLE[name]
    folder = make_source(variant, **fields)
    path = write_gguf(folder, tmp_path / "model.gguf")
    assert read_arch(locate(path).read_config()) == read_arch(locate(folder).read_config())
    read_source_model(path).check_tensors()
    with CheckpointReader(folder) as original, CheckpointReader(path) as reader:
        assert set(reader.names()) == set(original.names())
        for tensor in original.names():
            # The offset of Gemma's norms was added in float32 and is subtracted so.
            wanted = original.read(tensor)
            shifted = "norm" in tensor and variant.startswith("gemma")
            torch.testing.assert_close(reader.read(tensor), (wanted + 1) - 1 if shifted else wanted, rtol=0, atol=0)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        found, wanted = load_model(path)(ids).logits, load_model(folder)(ids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(("variant", "order"), [("llama", "pairs"), ("gpt_neox", "projections")])
def test_rows_left_in_the_order_of_the_file_are_another_model(
    variant: str,
    order: str,
    make_source: Callable[..., Path],
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_gguf(make_source(variant), tmp_path / "model.gguf")
    ids = torch.arange(20)[None]
    right = load_model(path)(ids).logits
    monkeypatch.setattr("refold.checkpoint.gguf.stored.find_rows", lambda stored, num_rows: None)
    wrong = load_model(path)(ids).logits
    assert (right - wrong).abs().max() > 0.1 * right.abs().max()


def test_norms_left_as_stored_are_another_model(
    make_source: Callable[..., Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_gguf(make_source("gemma"), tmp_path / "model.gguf")
    with CheckpointReader(path) as reader:
        name = "model.layers.0.input_layernorm.weight"
        source = GgufSource(path)
        assert source.stored_as(name).offset == 1.0
        assert source.stored_as("model.layers.0.self_attn.q_proj.weight") == ("same", 16, 0.0)
        assert float(reader.read(name).mean()) < 0.9


def test_split_files_are_one_model(
    make_source: Callable[..., Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_source("llama")
    write_gguf(folder, tmp_path / "split.gguf", split=15)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"split-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    whole = write_gguf(folder, tmp_path / "whole" / "model.gguf") if (tmp_path / "whole").mkdir() is None else None
    assert whole is not None
    with CheckpointReader(tmp_path / files[0]) as split, CheckpointReader(whole) as one:
        assert set(split.headers.files) == set(files)
        assert all(torch.equal(split.read(name), one.read(name)) for name in one.names())


def test_a_folder_with_one_file_is_that_file(
    make_source: Callable[..., Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_gguf(make_source("llama"), tmp_path / "model.gguf")
    source = locate(tmp_path)
    assert isinstance(source, GgufSource)
    assert source.fetch() == path
    assert source.name == "model.gguf"
    with CheckpointReader(source.fetch()) as reader:
        assert len(reader.names()) == 39


def test_a_source_is_told_by_its_hashes(
    make_source: Callable[..., Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    one = write_gguf(make_source("llama"), tmp_path / "one.gguf")
    same = tmp_path / "same.gguf"
    same.write_bytes(one.read_bytes())
    edited = write_gguf(make_source("llama"), tmp_path / "edited.gguf", edit=lambda writer: writer.add_name("x"))
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(one.read_bytes()[:-2] + b"\1\1")
    prints = [locate(path).fingerprint() for path in (one, same, edited, changed)]
    assert is_same_source(prints[0], prints[1])
    assert not is_same_source(prints[0], prints[2])
    assert prints[0]["sample_sha256"] != prints[3]["sample_sha256"]
    assert locate(one).hash_files() == locate(same).hash_files() != locate(changed).hash_files()


def test_tokenizer_and_special_tokens_come_along(
    make_model: Callable[..., Path], write_gguf: Callable[..., Path], sentences: tuple[str, ...], tmp_path: Path
) -> None:
    folder = make_model("llama")
    path = write_gguf(folder, tmp_path / "model.gguf")
    original, found = AutoTokenizer.from_pretrained(folder), load_tokenizer(path)
    for text in (*sentences, "".join(sentences), "<s>a</s> 123  b"):
        assert found.encode(text, add_special_tokens=False) == original.encode(text, add_special_tokens=False)
        assert found.decode(found.encode(text, add_special_tokens=False)) == text
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<s>", "</s>", "<pad>")
    assert found.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi\n"
    model = load_model(path)
    assert model.generation_config.eos_token_id == original.eos_token_id
    assert model.config.name_or_path == str(path)


def test_companions_make_a_folder_that_transformers_loads(
    make_model: Callable[..., Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_gguf(make_model("llama"), tmp_path / "model.gguf", types={"ffn_up": "Q8_0"})
    convert(path, tmp_path / "folded", "recursive")
    names = {each.name for each in (tmp_path / "folded").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= names
    recorded = json.loads((tmp_path / "folded" / "provenance.json").read_text())["stages"][0]["source"]
    assert recorded["path"] == str(path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert model.config.eos_token_id == 2
    assert len(AutoTokenizer.from_pretrained(tmp_path / "folded")) == 300


def test_a_fold_finds_its_teacher_by_the_file(
    make_model: Callable[..., Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_gguf(make_model("llama"), tmp_path / "model.gguf")
    convert(path, tmp_path / "folded", "recursive")
    teacher = provenance.teacher(tmp_path / "folded")
    assert isinstance(teacher, GgufSource)
    assert teacher.path == path
    path.write_bytes(path.read_bytes().replace(b"{{ message", b"{{ massage"))
    with pytest.raises(SourceError, match=r"model.gguf is required as it was converted \(config or weights changed"):
        provenance.teacher(tmp_path / "folded")
    path.unlink()
    with pytest.raises(SourceError, match=r"model.gguf is required \(missing\)"):
        provenance.teacher(tmp_path / "folded")


def test_the_plan_counts_types_and_bytes(
    make_source: Callable[..., Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_gguf(
        make_source("llama"),
        tmp_path / "model.gguf",
        types={"attn": "Q4_1", "ffn_up": "Q8_0", "token": "Q8_0", "output.": "Q8_0"},
    )
    model = read_source_model(path)
    assert model.dtype == "bfloat16"
    (note,) = model.notes
    assert note.startswith("quantised source: 17 tensors F32, 16 Q4_1, 6 Q8_0;")
    plain = read_source_model(write_gguf(make_source("llama"), tmp_path / "plain.gguf"))
    assert (plain.dtype, plain.notes) == ("float32", ())


def test_a_plan_needs_neither_torch_nor_numpy(
    make_source: Callable[..., Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_gguf(make_source("llama-llama3", hidden_act="silu"), tmp_path / "model.gguf")
    code = (
        "import sys\nsys.argv = ['refold', 'plan', sys.argv[1], '-r', 'recursive', '--allow-larger']\n"
        "from refold.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "loaded = {'torch', 'transformers', 'numpy', 'safetensors', 'gguf'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_tensor_without_a_place_is_named(
    make_source: Callable[..., Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    import numpy as np

    def add(writer: Any) -> None:
        writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, dtype=np.float32))

    path = write_gguf(make_source("llama"), tmp_path / "model.gguf", edit=add)
    with pytest.raises(SourceError, match=r"1 source tensor without a place: blk\.0\.attn_sinks\.weight"):
        read_source_model(path).check_tensors()


def test_a_type_that_cannot_be_dequantised_is_named(
    make_source: Callable[..., Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_gguf(make_source("llama"), tmp_path / "model.gguf", types={"blk.2.ffn_up": "F16"})
    raw = path.read_bytes()
    place = raw.index(b"blk.2.ffn_up.weight") + len("blk.2.ffn_up.weight") + 4 + 16
    # I16, which takes as many bytes.
    path.write_bytes(raw[:place] + (25).to_bytes(4, "little") + raw[place + 4 :])
    with pytest.raises(
        SourceError, match=r"blk\.2\.ffn_up\.weight: type must be one of .*Q8_0.* \(got I16\); quantise"
    ):
        read_source_model(path)
