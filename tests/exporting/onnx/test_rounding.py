"""Rounded matrices: the layout that ONNX Runtime reads, and graphs that compute with it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from refold.exporting.export import export
from refold.exporting.onnx.storage import BLOCK, FORMATS
from refold.modeling.load import load_model
from tests.exporting.onnx.runtime import Graph, largest_error, model_logits, padded_tokens

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FOLD = {"loops": 2}
CASES = {
    "strict-tied": ("llama-mqa-mlp-bias", {"fold": FOLD}),
    "relaxed": ("llama", {"fold": FOLD, "relax": {"type": "lora", "rank": 5}}),
    "low-rank": ("llama", {"factor": {"parameters": 0.5, "weight": "none"}}),
    "wide-blocks": ("llama", {"fold": FOLD}),
}
FIELDS = {"wide-blocks": {"hidden_size": 48, "intermediate_size": 80}}
"""Widths that blocks of 32 do not divide."""


@pytest.mark.parametrize("name", FORMATS)
def test_a_rounded_block_is_near_its_numbers(name):
    from refold.exporting.onnx.blocks import dequantise, round_blocks

    weight = torch.randn(7, 70, generator=torch.Generator().manual_seed(0))
    weight[2] = 0.0
    blocks, format = round_blocks(weight, FORMATS[name]), FORMATS[name]
    assert blocks.packed.shape == (7, 3, BLOCK * format.bits // 8)
    assert blocks.scales.shape == (7, 3)
    found = dequantise(blocks, format, 70)
    step = weight.abs().amax() / (format.zero - 1)
    assert (found - weight).abs().max() < 1.1 * step
    assert (found[2] == 0).all()
    assert format.num_bytes(7, 70) == blocks.packed.nbytes + blocks.scales.nbytes


def test_the_best_of_several_scales_is_taken():
    from refold.exporting.onnx import blocks

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    found = blocks.dequantise(blocks.round_blocks(weight, FORMATS["int4"]), FORMATS["int4"], 128)
    extreme = weight.unflatten(1, (-1, BLOCK))
    scale = extreme.gather(-1, extreme.abs().argmax(-1, keepdim=True)) / -8
    plain = ((extreme / scale).round().clamp(-8, 7) * scale).flatten(1)
    assert (found - weight).square().mean() < 0.95 * (plain - weight).square().mean()


@pytest.mark.parametrize("quantise", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_a_rounded_graph_computes_with_the_dequantised_weights(fold, tmp_path, case, quantise):
    folder = fold(*CASES[case], **FIELDS.get(case, {}))
    out, model = export(folder, tmp_path / "out", "onnx", quantise=quantise), load_model(folder)
    tokens, mask = padded_tokens(model.config.vocab_size)
    fast = Graph(out)(tokens, mask)
    leave_inputs(out)
    found = Graph(out)(tokens, mask)
    unrounded = model_logits(model, tokens, mask)
    round_model(model, folder, quantise)
    wanted = model_logits(model, tokens, mask)
    assert largest_error(found, wanted, mask) < 1e-4
    # The same weights without rounding are further away: the check can fail.
    assert largest_error(found, unrounded, mask) > 1e-3
    real = mask.astype(bool)
    assert np.linalg.norm((fast - wanted)[real]) < 0.1 * np.linalg.norm(wanted[real])


def leave_inputs(folder: Path) -> None:
    """Changes a graph so that inputs of rounded matrices are not rounded as well."""
    import onnx

    file = folder / "onnx" / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend(kept)
    file.write_bytes(model.SerializeToString())


def round_model(model, folder: Path, quantise: str) -> None:
    """Replaces the weights of a model by those that a graph rounded in the same way computes with."""
    from refold.exporting.onnx.blocks import dequantise, round_blocks
    from refold.exporting.onnx.storage import Storage
    from refold.exporting.target import ExportOptions

    storage = Storage(model.config.read_blueprint(), ExportOptions("float32", quantise))
    for name, weight in model.named_parameters():
        format = storage.format_of(name)
        if format is not None:
            weight.data.copy_(dequantise(round_blocks(weight.data, format), format, weight.shape[1]))


def test_kept_tensors_have_their_own_format(fold, tmp_path):
    import onnx

    folder = fold(*CASES["strict-tied"])
    keep = {"embeddings": "int8", "model.mlps.*": "float32"}
    out = export(folder, tmp_path / "out", "onnx", quantise="int4", keep=keep)
    graph = onnx.load(out / "onnx" / "model.onnx", load_external_data=False).graph
    bits = [attribute.i for node in graph.node for attribute in node.attribute if attribute.name == "bits"]
    # The head has 8 bits; four linears of each of four depths have 4.
    assert (bits.count(8), bits.count(4)) == (1, 16)
    names = {each.name for each in graph.initializer}
    assert "model.mlps.0.up_proj.weight" in names
    tokens = np.array([[5, 6, 7]])
    assert np.isfinite(Graph(out)(tokens)).all()
