"""Folds with linear maps in place of dropped parts, against transformers' model with the same weights changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import refold
from refold.calibration.layers import SourceLayers
from refold.calibration.replaced_weights import measure_replacements
from refold.checkpoint.reader import CheckpointReader
from refold.conversion.measured import map_plan, pack_text
from refold.data.readers import from_documents
from refold.errors import RecipeError
from refold.recipe.load import load_recipe
from refold.sources.pieces import PieceReader
from refold.sources.source_model import read_source_model

TEXT = from_documents(
    [f"Chapter {number}: the sea was calm, and {number * 7} ships lay on it." for number in range(99)]
)
SMALL = {"calibration": {"tokens": 512, "context": 32}}
ATTENTION = {**SMALL, "drop": {"attention": {"layers": [2], "replace": "linear"}}}
IDS = torch.randint(3, 290, (2, 24), generator=torch.Generator().manual_seed(3))


def maps_of(source: Path, recipe: dict[str, Any], folder: Path) -> list[torch.Tensor]:
    """Measures the maps of a recipe again, in the order of the layers."""
    model = read_source_model(source)
    layers = SourceLayers(model, PieceReader(model, CheckpointReader(source)))
    loaded = load_recipe(recipe)
    found = measure_replacements(layers, pack_text(model, TEXT, loaded), map_plan(refold.plan(source, loaded)), folder)
    return [each.read() for each in sorted(found, key=lambda each: each.replacement.layer)]


def silence(module: Any, inputs: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


@torch.no_grad()
def logits_of(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@torch.no_grad()
def test_a_fold_computes_the_source_with_the_map_in_its_projection(make_model, tmp_path: Path) -> None:
    source = make_model("llama-mqa-mlp-bias")
    plan = refold.convert(source, tmp_path / "fold", ATTENTION, calibration=TEXT)
    (matrix,) = maps_of(source, ATTENTION, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    layers = model.model.layers
    layers[2].self_attn.register_forward_hook(silence)
    plain = model(IDS).logits
    projection = layers[1].mlp.down_proj
    projection.weight.copy_(matrix @ projection.weight)
    projection.bias.copy_(matrix @ projection.bias)
    found = logits_of(tmp_path / "fold")
    assert torch.allclose(found, model(IDS).logits, atol=2e-4)
    assert not torch.allclose(found, plain, atol=1e-2)
    assert any("a linear map restores " in str(note) for note in plan.notes)
    assert not any("a linear map in place of" in str(note) for note in plan.notes)
    assert plan.blueprint == refold.plan(source, {"drop": {"attention": {"layers": [2]}}}).blueprint
    assert torch.equal(found, logits_of(tmp_path / "fold"))


@torch.no_grad()
def test_a_map_behind_an_output_norm_scales_its_channels(make_model, tmp_path: Path) -> None:
    source, recipe = make_model("gemma2"), {**SMALL, "drop": {"mlp": {"layers": [1], "replace": "linear"}}}
    refold.convert(source, tmp_path / "fold", recipe, calibration=TEXT)
    (diagonal,) = maps_of(source, recipe, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    layer = model.model.layers[1]
    layer.post_feedforward_layernorm.register_forward_hook(silence)
    plain = model(IDS).logits
    norm = layer.post_attention_layernorm
    norm.weight.copy_(diagonal * (1 + norm.weight) - 1)
    found = logits_of(tmp_path / "fold")
    assert torch.allclose(found, model(IDS).logits, atol=2e-4)
    assert not torch.allclose(found, plain, atol=1e-2)


@torch.no_grad()
def test_whole_layers_are_replaced_in_a_stock_export(make_model, tmp_path: Path) -> None:
    source = make_model("llama")
    recipe = {**SMALL, "drop": {"block": {"layers": [1, 3], "replace": "linear"}}}
    refold.convert(source, tmp_path / "fold", recipe, calibration=TEXT)
    refold.export(tmp_path / "fold", tmp_path / "dense", to="dense")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert exported.config.num_hidden_layers == 2
    assert torch.allclose(exported(IDS).logits, logits_of(tmp_path / "fold"), atol=2e-4)
    weights = load_file(tmp_path / "fold" / "model.safetensors")
    for part, (layer, matrix) in enumerate(zip((0, 2), maps_of(source, recipe, tmp_path), strict=True)):
        original = AutoModelForCausalLM.from_pretrained(source).model.layers[layer].mlp.down_proj.weight
        assert torch.allclose(weights[f"model.mlps.{part}.down_proj.weight"], matrix @ original, atol=1e-5)


def test_measured_drops_are_replaced_and_rounded(make_model, tmp_path: Path) -> None:
    recipe = {**SMALL, "drop": {"sublayers": {"count": 2, "replace": "linear"}}, "quantise": {"to": "int8"}}
    plan = refold.convert(make_model("llama"), tmp_path / "fold", recipe, calibration=TEXT)
    assert plan.influence is not None
    gone = {place for each in plan.starts.replacements for place in each.gone}
    kept = {
        (depth.source, pool)
        for depth in plan.blueprint.depths
        for pool in ("mixer", "mlp")
        if getattr(depth, pool) is not None
    }
    assert len(gone) == 2
    assert not gone & kept
    assert sum("a linear map restores" in str(note) for note in plan.notes) == len(plan.starts.replacements)
    assert bool(torch.isfinite(logits_of(tmp_path / "fold")).all())


@torch.no_grad()
def test_factors_are_fitted_to_the_mapped_weight(make_model, tmp_path: Path) -> None:
    source = make_model("llama")
    recipe = {**ATTENTION, "factor": {"parameters": 0.6, "weight": "none"}}
    refold.convert(source, tmp_path / "fold", recipe, calibration=TEXT)
    weights = load_file(tmp_path / "fold" / "model.safetensors")
    a, b = (weights[f"model.mlps.1.down_proj.{side}.weight"] for side in "ab")
    original = AutoModelForCausalLM.from_pretrained(source).model.layers[1].mlp.down_proj.weight
    (matrix,) = maps_of(source, recipe, tmp_path)
    for weight, is_fitted in ((matrix @ original, True), (original, False)):
        u, s, v = torch.linalg.svd(weight)
        nearest = u[:, : len(a)] * s[: len(a)] @ v[: len(a)]
        assert torch.allclose(b @ a, nearest, atol=1e-3) is is_fitted


@torch.no_grad()
@pytest.mark.parametrize("order", ["at_once", "sequential"])
def test_the_stream_behind_the_dropped_part_is_approached(make_model, tmp_path: Path, order: str) -> None:
    source = make_model("llama", num_hidden_layers=3)
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    packed = pack_text(read_source_model(source), TEXT, load_recipe(SMALL)).input_ids
    wanted = whole(packed, output_hidden_states=True).hidden_states[2]
    errors = {}
    for replace in ("none", "linear"):
        recipe = {
            "calibration": {"tokens": 512, "context": 32, "order": order},
            "drop": {"block": {"layers": [1], "replace": replace}},
            "factor": {"parameters": 0.9, "weight": "activations"},
        }
        refold.convert(source, tmp_path / replace, recipe, calibration=TEXT)
        fold = AutoModelForCausalLM.from_pretrained(tmp_path / replace, dtype=torch.float32)
        errors[replace] = float((fold(packed, output_hidden_states=True).hidden_states[1] - wanted).square().mean())
    assert errors["linear"] < 0.9 * errors["none"]


def test_maps_need_text(make_model, tmp_path: Path) -> None:
    source = make_model("llama")
    with pytest.raises(RecipeError, match=r"drop: calibration text is required for `replace: linear`, moments and .*"):
        refold.convert(source, tmp_path / "fold", ATTENTION)
    assert not (tmp_path / "fold").exists()
    with pytest.raises(RecipeError, match=r"this recipe does not use calibration text; .* or drop\.block\.replace"):
        refold.convert(source, tmp_path / "fold", {"drop": {"attention": {"layers": [2]}}}, calibration=TEXT)
