"""The exported folder: its bytes, dtypes, configs and notes, and errors that leave nothing behind."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from refold.blueprint.cost import count_parameters
from refold.checkpoint.manifest import verify
from refold.conversion.convert import convert
from refold.conversion.quantise import quantise
from refold.errors import ExportError, FolderError
from refold.exporting.export import export, survey
from refold.exporting.target import ExportOptions
from refold.exporting.targets.onnx import ONNX
from refold.modeling.load import load_model
from refold.studies.shipped import shipped_model
from tests.exporting.onnx.runtime import Graph, largest_error, model_logits, padded_tokens

pytest.importorskip("onnx")

FOLD = {"loops": 2}
STRICT = ("llama-mqa-mlp-bias", {"fold": FOLD})


@pytest.fixture(scope="module")
def strict(tmp_path_factory) -> Path:
    """The shipped model, folded: 12 depths of 6 layers."""
    folder = tmp_path_factory.mktemp("shipped") / "strict"
    convert(shipped_model(), folder, {"fold": FOLD})
    return folder


def graph_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / "onnx").iterdir())


def own_bytes(folder: Path) -> int:
    blueprint = load_model(folder).config.read_blueprint()
    return 2 * count_parameters(blueprint).total


def test_a_fold_keeps_its_bytes(strict, tmp_path):
    out = export(strict, tmp_path / "out", "onnx")
    assert graph_bytes(out) < 1.02 * own_bytes(strict)
    assert verify(out) == ()


def test_without_sharing_a_fold_would_be_larger(strict, tmp_path, monkeypatch):
    from refold.exporting.onnx.weights import GraphWeights

    multiply = GraphWeights.multiply

    def forget(self, x, name):
        self._values.pop(("transposed", name), None)
        return multiply(self, x, name)

    monkeypatch.setattr(GraphWeights, "multiply", forget)
    assert graph_bytes(export(strict, tmp_path / "out", "onnx")) > 1.5 * own_bytes(strict)


def test_rounded_folds_have_the_bytes_of_their_formats(strict, tmp_path):
    blueprint = load_model(strict).config.read_blueprint()
    for name, bits in (("int8", 8.5), ("int4", 4.5)):
        out = export(strict, tmp_path / name, "onnx", quantise=name)
        data = (out / "onnx" / "model.onnx_data").stat().st_size
        counted = ONNX.count_bytes(blueprint, ExportOptions("bfloat16", name))
        assert counted == pytest.approx(count_parameters(blueprint).total * bits / 8, rel=0.01)
        assert data == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-4), ("bfloat16", 1e-4), ("float16", 2e-2)])
def test_every_dtype_computes_the_model(fold, tmp_path, dtype, error):
    pytest.importorskip("onnxruntime")
    out = export(fold(*STRICT), tmp_path / "out", "onnx", dtype=dtype)
    model = load_model(fold(*STRICT))
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, dtype)).float() if weight.ndim == 2 else weight.data
    tokens, mask = padded_tokens(model.config.vocab_size)
    assert largest_error(Graph(out)(tokens, mask), model_logits(model, tokens, mask), mask) < error


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_number_that_overflows_is_named(make_source, tmp_path, name):
    source = tmp_path / "source"
    shutil.copytree(make_source("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[3] = 70000.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FolderError, match=r"finite numbers are required .got inf at .*values above 65,504 overflow"):
        export(source, tmp_path / "out", "onnx", dtype="float16")
    assert not (tmp_path / "out").exists()
    export(source, tmp_path / "out", "onnx", dtype="bfloat16")


def test_scores_of_masked_keys_stay_finite_in_float16():
    from onnx import TensorProto

    from refold.exporting.onnx.batch_values import LOWEST

    lowest = np.float16(LOWEST[TensorProto.FLOAT16])
    assert np.isfinite(lowest + np.float16(-1000.0))
    assert np.exp(lowest - np.float16(-1000.0)) == 0.0


def test_a_wrong_rotation_is_found(fold, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    from refold.exporting.onnx.graph import GraphBuilder

    node = GraphBuilder.node

    def interleaved(self, op, *inputs, **attributes):
        if op == "RotaryEmbedding":
            attributes["interleaved"] = 1
        return node(self, op, *inputs, **attributes)

    monkeypatch.setattr(GraphBuilder, "node", interleaved)
    graph, model = Graph(export(fold(*STRICT), tmp_path / "out", "onnx")), load_model(fold(*STRICT))
    tokens, mask = padded_tokens(model.config.vocab_size)
    assert largest_error(graph(tokens, mask), model_logits(model, tokens, mask), mask) > 1e-2


def test_configs_describe_depths_and_caches(fold, tmp_path):
    out = export(
        fold("mistral-window", {"fold": FOLD, "drop": {"attention": {"layers": [0]}}}), tmp_path / "out", "onnx"
    )
    genai, web = (json.loads((out / name).read_text()) for name in ("genai_config.json", "config.json"))
    decoder = genai["model"]["decoder"]
    assert decoder["filename"] == "onnx/model.onnx"
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (4, 2, 8)
    assert decoder["session_options"]["session.disable_prepacking"] == "1"
    assert genai["search"]["past_present_share_buffer"]
    assert (web["model_type"], web["num_hidden_layers"], web["num_key_value_heads"]) == ("mistral", 4, 2)
    assert web["transformers.js_config"]["use_external_data_format"]
    assert (out / "tokenizer.json").is_file()
    assert "onnxruntime_genai" in (out / "README.md").read_text()


def test_a_runtime_that_cannot_generate_is_named(fold, tmp_path):
    some_heads = fold("llama", {"share_kv": [{"depth": 2, "from": 1, "heads": [1]}]})
    (found,) = (each for each in survey(some_heads) if each.target is ONNX)
    assert found.verdict.status == "kept"
    reason = "ONNX Runtime GenAI cannot generate with this graph (depths cache some of the key-value heads)"
    assert any(reason in sentence for sentence in found.verdict.reasons)
    out = export(some_heads, tmp_path / "out", "onnx")
    assert not (out / "genai_config.json").exists()
    assert reason in (out / "README.md").read_text()


def test_exits_are_dropped_with_a_note(fold, tmp_path):
    out = export(fold("llama", {"fold": FOLD, "exits": {"at": [1], "norm": "own"}}), tmp_path / "out", "onnx")
    assert "a graph has no early exits" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantise": "int3"}, r"export: quantise: must be one of int8, int4, float \(got 'int3'\)"),
        (
            {"quantise": "int4", "keep": {"heads": "int8"}},
            r"keep: a group \(embeddings, head\) or a pattern of tensor names",
        ),
        ({"quantise": "int4", "keep": {"head": "q8_0"}}, r"export: keep.head: must be one of int8, int4, float32"),
    ],
)
def test_a_wrong_format_is_named_and_nothing_is_written(fold, tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        export(fold(*STRICT), tmp_path / "out", "onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(fold, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match=r"the package onnx is required by --to onnx .*pip install 'refold\[onnx\]'"):
        export(fold(*STRICT), tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(fold, tmp_path, monkeypatch):
    monkeypatch.setattr(type(ONNX), "count_bytes", lambda *_: 10**18)
    with pytest.raises(FolderError, match="bytes of disk are required"):
        export(fold(*STRICT), tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_folders_of_others_are_not_replaced(fold, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FolderError, match="a new folder, or one written by refold"):
        export(fold(*STRICT), tmp_path / "out", "onnx", overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_stored_integers_are_exported_dequantised(fold, tmp_path):
    strict = fold("llama-mqa-mlp-bias", {"fold": {"loops": 2}})
    quantise(strict, tmp_path / "small", "int8")
    out = export(tmp_path / "small", tmp_path / "out", "onnx", quantise="float")
    model: Any = load_model(tmp_path / "small")
    model.hold_integers()
    tokens, mask = padded_tokens(model.config.vocab_size)
    assert largest_error(Graph(out)(tokens, mask), model_logits(model, tokens, mask), mask) < 1e-4
    # The control: the model before rounding is further away.
    assert largest_error(Graph(out)(tokens, mask), model_logits(load_model(strict), tokens, mask), mask) > 1e-3
