"""Number formats of GGUF files: their choice, their bytes, and their rounding in llama.cpp."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refold.conversion.convert import convert
from refold.errors import ExportError, FolderError
from refold.exporting.export import export
from refold.exporting.gguf.choice import choose_contents
from refold.exporting.gguf.number_formats import QUANTISATIONS, ChosenFormats, choose_formats, count_file_bytes
from refold.exporting.opened import opened
from refold.exporting.target import ExportOptions
from refold.modeling.load import load_model

gguf = pytest.importorskip("gguf")
SHIPPED = Path(__file__).parents[3] / "refold" / "shipped" / "stdlib-5m"


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strict") / "folded"
    convert(SHIPPED, folder, {"fold": {"loops": 2}})
    return folder


def _chosen(model: Path, **options: Any) -> ChosenFormats:
    with opened(model) as found:
        contents = choose_contents(found.blueprint).contents
    assert contents is not None
    return choose_formats(contents, ExportOptions(**{"dtype": "bfloat16", **options}))


def test_a_strict_fold_takes_at_most_two_per_cent_more_than_its_folder(strict, tmp_path):
    out = export(strict, tmp_path / "model.gguf", "gguf")
    folded = sum(path.stat().st_size for path in strict.glob("*.safetensors"))
    source = sum(path.stat().st_size for path in SHIPPED.glob("*.safetensors"))
    assert out.stat().st_size < 1.02 * folded + 80_000, "weights, and a tokenizer of 2,048 tokens"
    assert out.stat().st_size < 0.62 * source


def test_the_bytes_are_known_before_the_file_is_written(strict, tmp_path):
    for name in (None, "q4_1"):
        out = export(strict, tmp_path / f"{name}.gguf", "gguf", quantise=name)
        with opened(strict) as model:
            contents = choose_contents(model.blueprint).contents
            assert contents is not None
            counted = count_file_bytes(contents, ExportOptions(model.dtype, name))
        reader = gguf.GGUFReader(out)
        assert counted == out.stat().st_size - reader.data_offset


def test_matrices_are_quantised_and_kept_tensors_are_not(strict):
    keep = {"embeddings": "q8_0", "blk.*.ffn_down.weight": "f16"}
    chosen, notes = _chosen(strict, quantise="q4_0", keep=keep)
    assert notes == ()
    assert chosen["token_embd.weight"] == "q8_0"
    assert chosen["blk.3.ffn_down.weight"] == "f16"
    assert chosen["blk.3.ffn_up.weight"] == "q4_0"
    assert chosen["blk.3.ffn_norm.weight"] == chosen["output_norm.weight"] == "f32"


def test_a_tied_embedding_is_stored_once_and_kept_by_either_name(strict, tmp_path):
    assert _chosen(strict, quantise="q4_0", keep={"head": "f16"}).by_name["token_embd.weight"] == "f16"
    out = export(strict, tmp_path / "model.gguf", "gguf", quantise="q8_0")
    assert "output.weight" not in [tensor.name for tensor in gguf.GGUFReader(out).tensors]
    with pytest.raises(ExportError, match=r"one format for embeddings and head is required .they are one tensor here"):
        _chosen(strict, quantise="q4_0", keep={"head": "f16", "embeddings": "q8_0"})


def test_rows_that_blocks_do_not_divide_stay_in_f16_with_a_note(make_source):
    chosen, notes = _chosen(make_source("llama"), quantise="q5_0")
    assert chosen["blk.0.ffn_down.weight"] == "f16"
    assert chosen["blk.0.ffn_up.weight"] == "q5_0"
    assert notes == (
        "4 tensors are stored in f16 instead of q5_0: their rows of 48 numbers are no multiple of 32, such as "
        "blk.0.ffn_down.weight",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantise": "q4_k"}, r"quantise: must be one of q8_0, q4_0.*got 'q4_k'"),
        ({"quantise": "q4_0", "keep": {"head": "q9"}}, r"keep: head: must be one of f32.*got 'q9'"),
        (
            {"quantise": "q4_0", "keep": {"blk.9*": "f16"}},
            r"a pattern of matrices is required .got 'blk.9.', which fits",
        ),
        ({"keep": {"head": "f16"}}, r"quantise is required with it"),
    ],
)
def test_formats_that_do_not_exist_are_refused(options, message, make_source, tmp_path):
    with pytest.raises(ExportError, match=message):
        export(make_source("llama"), tmp_path / "model.gguf", "gguf", **options)
    assert not (tmp_path / "model.gguf").exists()


def test_numbers_too_large_for_half_precision_are_refused(make_source, tmp_path):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    source.mkdir()
    for file in make_source("llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(FolderError, match=r"blk.1.ffn_up.weight: finite numbers are required .*overflow float16"):
        export(source, tmp_path / "model.gguf", "gguf", dtype="float16")
    assert not list(tmp_path.glob("*.gguf"))


@pytest.fixture(scope="module")
def quantised(llama, make_job, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("quantised")
    files = {name: export(SHIPPED, folder / f"{name}.gguf", "gguf", quantise=name) for name in QUANTISATIONS}
    jobs = [make_job(file, num_tokens=64, vocab_size=2048) for file in files.values()]
    return {name: (files[name], answer) for name, answer in zip(files, llama(jobs), strict=True)}


def _dequantised(file: Path) -> torch.nn.Module:
    """The shipped model with the weights of a file, whose rows of queries and keys stand in pairs."""
    model = load_model(SHIPPED, device="cpu").float()
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj"} | {
        f"ffn_{each}": f"mlp.{each}_proj" for each in ("gate", "up", "down")
    }
    names |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    outside = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for tensor in gguf.GGUFReader(file).tensors:
        value = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        parts = tensor.name.split(".")
        if len(parts) == 4:
            value = (
                value.reshape(-1, 16, 2, value.shape[-1]).transpose(1, 2).reshape(value.shape)
                if parts[2]
                in (
                    "attn_q",
                    "attn_k",
                )
                else value
            )
            name = f"model.layers.{parts[1]}.{names[parts[2]]}.weight"
        else:
            name = outside[tensor.name]
        with torch.no_grad():
            model.get_parameter(name).copy_(value)
    return model


@pytest.mark.parametrize("name", QUANTISATIONS)
def test_llama_cpp_computes_with_the_rounded_weights(name: str, quantised, gap):
    file, answer = quantised[name]
    rounded = gap(_dequantised(file), answer, end=0)
    exact = gap(load_model(SHIPPED, device="cpu").float(), answer, end=0)
    # llama.cpp rounds activations to 8 bits too.
    assert rounded.logits < 0.02
    assert rounded.greedy < 0.02
    if name.startswith("q4"):
        assert exact.logits > 3 * rounded.logits, "the control: weights that are not rounded"
