"""Stored integers of a model in ONNX graphs: the same numbers, without a second rounding."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refold.conversion.quantise import quantise
from refold.exporting.export import export, survey, write_export
from refold.exporting.onnx import weights
from refold.exporting.onnx.storage import FORMATS
from refold.exporting.opened import opened
from refold.exporting.target import ExportOptions
from refold.exporting.targets.onnx import ONNX
from refold.modeling.load import load_model
from tests.exporting.onnx.runtime import PROMPT_TOKENS, Graph, largest_error, model_logits, padded_tokens
from tests.exporting.onnx.test_rounding import leave_inputs

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FOLD = {"fold": {"loops": 2}}
RELAXED = {"fold": {"loops": 2}, "relax": {"type": "lora", "rank": 5}}
CASES = {
    "int4": ("llama", FOLD, "int4", {}),
    "tied": ("llama-mqa-mlp-bias", FOLD, "int4", {"embeddings": "int8"}),
    "mixed": ("llama", FOLD, "int4", {"down_proj": "int8", "embeddings": "float"}),
    "relaxed": ("llama", RELAXED, "int8", {}),
    "low-rank": ("llama", {"factor": {"parameters": 0.5, "weight": "none"}}, "int8", {}),
    "wide-blocks": ("llama", FOLD, "int4", {}),
}
FIELDS = {"wide-blocks": {"hidden_size": 48, "intermediate_size": 80}}
"""Widths that blocks of 32 do not divide."""


@pytest.fixture(scope="module")
def small(fold, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            variant, recipe, to, keep = CASES[name]
            made[name] = tmp_path_factory.mktemp("quantised") / "small"
            quantise(fold(variant, recipe, **FIELDS.get(name, {})), made[name], to, keep=keep)
        return made[name]

    return make


def _numbers(folder: Path, model: Path) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the dequantised matrices of a graph, and those of the model, by name."""
    import onnx
    from onnx.numpy_helper import to_array

    from refold.exporting.onnx.blocks import Blocks, dequantise

    graph = onnx.load(folder / "onnx" / "model.onnx").graph
    values = {each.name: each for each in graph.initializer}
    found = {}
    with opened(model) as source:
        for name in [name.removesuffix(".packed") for name in values if name.endswith(".packed")]:
            arrays = [torch.tensor(to_array(values[f"{name}.{piece}"])) for piece in ("packed", "scales")]
            wanted = source.reader.read(name, torch.float32)
            format = FORMATS["int4" if arrays[0].shape[-1] == 16 else "int8"]
            found[name] = dequantise(Blocks(*arrays), format, wanted.shape[1]).numpy(), wanted.numpy()
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_graph_has_the_numbers_of_the_folder_and_computes_with_them(name: str, small, tmp_path: Path):
    folder, said = small(name), []
    out = write_export(folder, tmp_path / "out", ONNX, ExportOptions(), report=said.append)
    numbers = _numbers(out, folder)
    assert numbers
    assert all(np.array_equal(found, wanted) for found, wanted in numbers.values())
    assert f"{len(numbers)} matrices have the model's own integers, which were not rounded again" in said
    model: Any = load_model(folder, dtype="float32", device="cpu")
    model.hold_integers()
    tokens, mask = padded_tokens(model.config.vocab_size)
    wanted = model_logits(model, tokens, mask)
    leave_inputs(out)
    graph = Graph(out)
    assert largest_error(graph(tokens, mask), wanted, mask) < 1e-4
    prompt = tokens[0, :PROMPT_TOKENS].tolist()
    chosen = graph.continue_greedily(prompt, 64)
    text = torch.tensor([prompt + chosen])
    with torch.inference_mode():
        best = model(text).logits[0, len(prompt) - 1 : -1].argmax(-1)
    assert best.tolist() == chosen
    bytes_listed = next(each.num_bytes for each in survey(folder) if each.target is ONNX)
    assert bytes_listed is not None
    size = sum(file.stat().st_size for file in (out / "onnx").iterdir())
    assert bytes_listed <= size < bytes_listed + 120_000, "the graph itself and alignment come on top"


def test_control_rounding_again_gives_other_numbers(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = small("relaxed")
    monkeypatch.setattr(weights, "to_blocks", lambda rounded: None)
    out = export(folder, tmp_path / "out", "onnx")
    numbers = _numbers(out, folder)
    assert not any(np.array_equal(found, wanted) for found, wanted in numbers.values())
    assert "rounded again" not in (out / "README.md").read_text()


def test_a_format_asked_for_copies_integers_that_it_holds(small, tmp_path: Path):
    folder = small("int4")
    wide = _numbers(export(folder, tmp_path / "wide", "onnx", quantise="int8"), folder)
    assert all(np.array_equal(found, wanted) for found, wanted in wide.values())
    narrow = _numbers(export(folder, tmp_path / "narrow", "onnx", quantise="int4"), folder)
    others = {name for name, (found, wanted) in narrow.items() if not np.array_equal(found, wanted)}
    assert others == {"model.embed_tokens.weight", "lm_head.weight"}, "8 bits do not fit 4"


def test_integers_without_a_format_and_floats_asked_for_have_a_note(fold, tmp_path: Path):
    said: list[str] = []
    quantise(fold("llama", FOLD), tmp_path / "small", "int4z", keep={"down_proj": "int8"})
    write_export(tmp_path / "small", tmp_path / "out", ONNX, ExportOptions("bfloat16"), report=said.append)
    (told,) = [sentence for sentence in said if "int4z" in sentence]
    assert told.startswith("12 matrices that the model stores as int4z are written as floats, in 3.")
    said.clear()
    options = ExportOptions("bfloat16", "float")
    write_export(tmp_path / "small", tmp_path / "floats", ONNX, options, report=said.append)
    assert any("the model's integers are written as bfloat16: weights take" in sentence for sentence in said)
    assert not _numbers(tmp_path / "floats", tmp_path / "small")
