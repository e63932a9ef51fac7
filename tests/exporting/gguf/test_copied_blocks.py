"""Stored integers of a model in GGUF files: the same numbers, without a second rounding."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refold.blueprint.integers import SCHEMES
from refold.conversion.convert import ConvertOptions, convert
from refold.conversion.quantise import quantise
from refold.errors import ExportError
from refold.exporting.export import export, survey, write_export
from refold.exporting.gguf import copied_blocks, file_writer, row_order
from refold.exporting.integer_blocks import to_blocks
from refold.exporting.target import ExportOptions
from refold.exporting.targets.gguf import GGUF
from refold.modeling.load import load_model
from refold.nn.rounding import Rounded

gguf = pytest.importorskip("gguf")
SHIPPED = Path(__file__).parents[3] / "refold" / "shipped" / "stdlib-5m"
SIZES = {"hidden_size": 64, "intermediate_size": 96}
FOLD = {"fold": {"loops": 2}}
UNROLLED = {"fold": {"loops": 2, "prelude": 1, "coda": 1}}
RELAXED = {"fold": {"loops": 2}, "relax": {"type": "lora", "rank": 4}}
Small = Callable[..., Path]


@pytest.fixture(scope="module")
def small(make_named, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Makes the quantised fold of a source."""

    def make(to: str, keep: Mapping[str, str] | None = None, variant: str = "llama", recipe: Any = None) -> Path:
        folder = tmp_path_factory.mktemp("quantised")
        convert(
            make_named(variant, **SIZES), folder / "folded", recipe or FOLD, options=ConvertOptions(allow_larger=True)
        )
        quantise(folder / "folded", folder / "small", to, keep=keep)
        return folder / "small"

    return make


def _read(file: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file as the numbers that llama.cpp computes with."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(file).tensors
    }


def _types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def _differing(first: Path, second: Path) -> list[str]:
    one, other = _read(first), _read(second)
    assert list(one) == list(other)
    return [name for name in one if not np.array_equal(one[name].ravel(), other[name].ravel())]


CASES = {
    "unrolled": ("int4", {}, "llama", UNROLLED),
    "looped": ("int8", {}, "llama", FOLD),
    "mixed": ("int4", {"down_proj": "int8", "embeddings": "float"}, "llama", FOLD),
    "packed": ("int4", {"v_proj": "int8"}, "phi3", UNROLLED),
    "narrow": ("int3g64", {"down_proj": "int2", "up_proj": "int5g64", "q_proj": "int6g128"}, "llama", UNROLLED),
    "pruned": ("int4", {"embeddings": "int4"}, "llama", {"drop": {"mlp": {"layers": [1]}}}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_has_the_numbers_of_the_folder(name: str, small: Small, tmp_path: Path):
    to, keep, variant, recipe = CASES[name]
    folder = small(to, keep, variant, recipe)
    said: list[str] = []
    copied = write_export(folder, tmp_path / "copied.gguf", GGUF, ExportOptions(), report=said.append)
    exact = export(folder, tmp_path / "exact.gguf", "gguf", quantise="float", dtype="float32")
    assert _differing(copied, exact) == []
    types = _types(copied)
    names = {"int2": "Q4_0", "int3g64": "Q4_0", "int4": "Q4_0", "int8": "Q8_0", "float": "F32"}
    wider = [sentence for sentence in said if "keep their numbers in wider integers" in sentence]
    assert bool(wider) == (name == "narrow")
    if wider:
        assert "matrices that the model stores as int2, int3g64, int5g64, int6g128 keep" in wider[0]
    assert types["token_embd.weight"] == names[keep.get("embeddings", "int8")]
    assert types["blk.0.ffn_down.weight"] == names[keep.get("down_proj", to)]
    assert any("have the model's own integers, which were not rounded again" in sentence for sentence in said)
    (listed,) = [each.num_bytes for each in survey(folder) if each.target is GGUF]
    assert listed == copied.stat().st_size - gguf.GGUFReader(copied).data_offset
    assert ("nanbeige" in said[0]) == (name in ("looped", "mixed")), "each stored layer once"


def test_control_rounding_again_gives_other_numbers(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = small("int8")
    exact = export(folder, tmp_path / "exact.gguf", "gguf", quantise="float", dtype="float32")
    monkeypatch.setattr(file_writer, "read_tensor_blocks", lambda *rest: None)
    again = export(folder, tmp_path / "again.gguf", "gguf")
    assert len(_differing(again, exact)) == 2 * 7 + 2, "linears, embedding and head"


def test_control_integers_in_another_order_of_rows_are_noticed(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = small("int4")
    exact = export(folder, tmp_path / "exact.gguf", "gguf", quantise="float", dtype="float32")
    monkeypatch.setattr(row_order, "pair_rows", lambda value, num_heads: value)
    plain = export(folder, tmp_path / "plain.gguf", "gguf")
    assert {name.split(".")[2] for name in _differing(plain, exact)} == {"attn_q", "attn_k"}


def test_a_format_asked_for_copies_integers_that_it_holds(small: Small, tmp_path: Path):
    folder = small("int4", {"embeddings": "int8"})
    exact = export(folder, tmp_path / "exact.gguf", "gguf", quantise="float", dtype="float32")
    wide = export(folder, tmp_path / "wide.gguf", "gguf", quantise="q8_0")
    assert set(_types(wide).values()) == {"F32", "Q8_0"}
    assert _differing(wide, exact) == []
    narrow = export(folder, tmp_path / "narrow.gguf", "gguf", quantise="q4_0")
    assert _differing(narrow, exact) == ["token_embd.weight", "output.weight"], "8 bits do not fit 4"


def test_integers_that_no_format_has_become_floats_with_a_note(small: Small, tmp_path: Path):
    said: list[str] = []
    folder = small("int4z", {"down_proj": "int8"})
    out = write_export(folder, tmp_path / "a.gguf", GGUF, ExportOptions("bfloat16"), report=said.append)
    types = _types(out)
    assert (types["blk.0.ffn_up.weight"], types["blk.0.ffn_down.weight"]) == ("BF16", "Q8_0")
    (told,) = [sentence for sentence in said if "int4z" in sentence]
    assert told.startswith("12 matrices that the model stores as int4z are written as floats, in 3.")


def test_weights_with_loras_are_rounded_once_more_and_the_note_says_so(small: Small, tmp_path: Path):
    said: list[str] = []
    folder = small("int8", recipe=RELAXED)
    out = write_export(folder, tmp_path / "a.gguf", GGUF, ExportOptions(), report=said.append)
    assert _types(out)["blk.0.ffn_up.weight"] == "Q8_0"
    assert "28 matrices are rounded again: LoRAs are merged in, or factors multiplied out" in said
    exact = export(folder, tmp_path / "exact.gguf", "gguf", quantise="float", dtype="float32")
    found, wanted = _read(out)["blk.0.ffn_up.weight"], _read(exact)["blk.0.ffn_up.weight"]
    assert 0 < np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


def test_floats_can_be_asked_for_and_the_note_says_how_much_larger_they_are(small: Small, tmp_path: Path):
    said: list[str] = []
    folder = small("int4", {"embeddings": "int8"})
    options = ExportOptions("bfloat16", "float")
    out = write_export(folder, tmp_path / "a.gguf", GGUF, options, report=said.append)
    assert set(_types(out).values()) == {"F32", "BF16"}
    assert any("the model's integers are written as bfloat16: weights take" in sentence for sentence in said)
    fields = gguf.GGUFReader(out).fields
    stage = json.loads(fields["refold.provenance"].contents())[-1]
    assert stage["recipe"]["quantise"] == "float"
    with pytest.raises(ExportError, match=r"keep: quantise is required with it .got float.; pass --quantise"):
        export(folder, tmp_path / "b.gguf", "gguf", quantise="float", keep={"head": "q8_0"})


def test_a_base_of_adapters_has_the_integers_although_the_model_has_loras(small: Small, tmp_path: Path):
    folder = small("int8", recipe=RELAXED)
    out = export(folder, tmp_path / "base", "gguf-lora")
    exact = export(folder, tmp_path / "exact", "gguf-lora", quantise="float", dtype="float32")
    assert _differing(out / "base.gguf", exact / "base.gguf") == []
    assert "Q8_0" in _types(out / "base.gguf").values()


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_blocks_are_those_that_the_package_reads(name: str):
    seed = torch.Generator().manual_seed(0)
    # No integer reaches the end of the range, as after rounding with error feedback.
    integers = torch.randint(3, 13, (6, 4, 32), generator=seed).float()
    scale = torch.randn(6, 4, 1, generator=seed).bfloat16().float()
    rounded = Rounded(integers, scale, torch.full_like(scale, 8), 128)
    blocks = to_blocks(rounded)
    assert blocks is not None
    kind = gguf.GGMLQuantizationType[name.upper()]
    data = np.frombuffer(copied_blocks.encode_blocks(blocks, name), np.uint8).reshape(6, -1)
    wanted = rounded.dequantise().numpy()
    assert np.array_equal(gguf.quants.dequantize(data, kind), wanted)
    again = gguf.quants.dequantize(gguf.quants.quantize(wanted, kind), kind)
    assert not np.array_equal(again, wanted), "the control: rounding again"


def test_scales_outside_float16_are_rounded_near_zero_and_refused_above():
    scheme = SCHEMES["int8"]
    integers = torch.tensor([[[-127.0, 5.0, 3.0]]])
    assert scheme.group is None
    tiny = to_blocks(Rounded(integers, torch.full((1, 1, 1), 1e-9), torch.zeros(1, 1, 1), 3))
    assert tiny is not None
    assert (tiny.dequantise(3) == 0).all()
    assert to_blocks(Rounded(integers, torch.full((1, 1, 1), 1e6), torch.zeros(1, 1, 1), 3)) is None


def test_llama_cpp_computes_with_the_integers(llama, make_job, gap, tmp_path: Path):
    convert(SHIPPED, tmp_path / "folded", FOLD)
    folders = {to: tmp_path / to for to in ("int4", "int8")}
    for to, folder in folders.items():
        quantise(tmp_path / "folded", folder, to)
    files = {to: export(folder, tmp_path / f"{to}.gguf", "gguf") for to, folder in folders.items()}
    answers = llama([make_job(file, vocab_size=2048) for file in files.values()])
    for (to, folder), answer in zip(folders.items(), answers, strict=True):
        model: Any = load_model(folder, dtype="float32", device="cpu")
        model.hold_integers()
        found = gap(model, answer, end=0)
        # llama.cpp rounds the inputs of products with integers to 8 bits.
        assert found.logits < 0.02
        assert found.greedy < 0.02
        if to == "int4":
            control = gap(load_model(tmp_path / "folded", dtype="float32", device="cpu"), answer, end=0)
            assert control.logits > 3 * found.logits, "the control: weights that are not rounded"


def test_a_gguf_source_gives_its_name_to_the_file(make_named, tmp_path: Path):
    source = export(make_named("llama"), tmp_path / "tale.gguf", "gguf")
    out = export(source, tmp_path / "again.gguf", "gguf")
    assert gguf.GGUFReader(out).fields["general.name"].contents() == "tale.gguf"
