"""Weights that mixers take from attention: exactly those of the plan, with all other weights unchanged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from refold.conversion.convert import ConvertOptions, convert
from refold.errors import RecipeError
from refold.modeling.load import load_model
from refold.planning.plan import StackPlan
from refold.planning.plan import plan as make_plan

Converted = tuple[StackPlan, dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture
def transfer(make_source: Callable[..., Path], tmp_path: Path) -> Callable[..., Converted]:
    """Converts a tiny source with one mixer; returns plan, source tensors and target tensors."""

    def make(swap: dict[str, Any], variant: str = "llama", **sections: Any) -> Converted:
        source, out = make_source(variant), tmp_path / "out"
        plan = convert(source, out, {"mixers": [swap], **sections}, options=ConvertOptions(allow_larger=True))
        return plan, load_file(source / "model.safetensors"), load_file(out / "model.safetensors")

    return make


def far(one: Tensor, other: Tensor) -> float:
    """Largest difference, beside the largest number."""
    return float((one - other).detach().abs().max() / other.detach().abs().max())


def said(plan: StackPlan, tensors: str) -> list[tuple[str, str]]:
    return [(line.how, line.reason) for line in plan.lines if line.tensors == tensors]


def layer(name: str, index: int) -> str:
    return f"model.layers.{index}.{name}.weight"


@pytest.mark.parametrize("mixer", ["retention", "mamba2", "gla", "gated_deltanet", "linear_attention"])
def test_everything_that_is_no_mixer_stays_bit_equal(transfer, mixer):
    _, given, found = transfer({"type": mixer, "transfer": ["o_proj", "mlp"]})
    pairs = {"model.embed_tokens.weight": "model.embed_tokens.weight", "model.norm.weight": "model.norm.weight"}
    for index in range(4):
        for name in ("gate_proj", "up_proj", "down_proj"):
            pairs[layer(f"mlp.{name}", index)] = f"model.mlps.{index}.{name}.weight"
        pairs[layer("post_attention_layernorm", index)] = f"model.mlps.{index}.input_norm.weight"
        pairs[layer("input_layernorm", index)] = f"model.mixers.{index}.input_norm.weight"
        pairs[layer("self_attn.o_proj", index)] = f"model.mixers.{index}.o_proj.weight"
    for source, target in pairs.items():
        assert torch.equal(given[source], found[target]), target


def test_xatl_starts_queries_keys_and_values_fresh(transfer):
    plan, given, found = transfer({"type": "retention"})
    assert said(plan, "model.mixers.*.q_proj.weight") == [("fresh", "not named in transfer")]
    assert said(plan, "model.mixers.*.g_proj.weight") == [("fresh", "new in retention")]
    assert said(plan, "model.mixers.*.o_proj.weight") == [("copied", "")]
    assert said(plan, "model.layers.*.self_attn.k_proj.weight") == [("dropped", "not carried over to retention")]
    assert not torch.equal(given[layer("self_attn.q_proj", 0)], found["model.mixers.0.q_proj.weight"])


@pytest.mark.parametrize("fit", ["none", "data_free", "calibration"])
def test_feature_maps_are_said_to_be_new_or_fitted(make_source, fit):
    swap = {"type": "linear_attention", "feature_map": "t2r", "window": 4, "fit": fit}
    made = make_plan(make_source(), {"mixers": [swap]}, allow_larger=True)
    reason = "new in linear_attention" if fit == "none" else f"fitted to the source's attention ({fit})"
    for name in ("q_map.weight", "k_map.weight"):
        assert said(made, f"model.mixers.*.{name}") == [("fresh", reason)]
    assert said(made, "model.mixers.*.blend.share") == [("fresh", "new in linear_attention")]
    scratch = make_plan(make_source(), {"mixers": [swap], "weights": "fresh"}, allow_larger=True)
    assert said(scratch, "model.mixers.*.q_map.weight") == [("fresh", "weights: fresh")]


def test_each_choice_takes_over_less(transfer):
    plan, _, _ = transfer({"type": "retention", "transfer": []})
    assert said(plan, "model.mixers.*.o_proj.weight") == [("fresh", "not named in transfer")]
    assert said(plan, "model.mlps.*.up_proj.weight") == [("fresh", "not named in transfer")]
    assert said(plan, "model.layers.*.mlp.up_proj.weight") == [("dropped", "not carried over: the MLP is fresh")]
    assert said(plan, "model.mixers.*.input_norm.weight") == [("copied", "")]


def test_grouped_heads_are_repeated(transfer):
    plan, given, found = transfer({"type": "gla", "transfer": "all"})
    assert said(plan, "model.mixers.*.k_proj.weight") == [("repeated", "each key-value head 2 times")]
    key = given[layer("self_attn.k_proj", 2)].unflatten(0, (2, 8))
    assert torch.equal(found["model.mixers.2.k_proj.weight"], torch.stack((key, key), dim=1).flatten(0, 2))


def test_grouped_heads_stay_where_the_mixer_has_as_few(transfer):
    plan, given, found = transfer({"type": "gla", "transfer": "all", "k_heads": 2, "v_heads": 2})
    assert said(plan, "model.mixers.*.v_proj.weight") == [("copied", "")]
    assert torch.equal(found["model.mixers.1.v_proj.weight"], given[layer("self_attn.v_proj", 1)])


def test_fused_projections_are_split_with_their_biases(transfer):
    plan, given, found = transfer({"type": "mamba2", "transfer": "all"}, "gpt_neox")
    assert said(plan, "model.mixers.*.q_proj.bias") == [("split", "split from query_key_value")]
    fused = given["gpt_neox.layers.1.attention.query_key_value.bias"].unflatten(0, (4, 3, 8))
    assert torch.equal(found["model.mixers.1.v_proj.bias"], fused[:, 2].flatten())


def test_mean_and_loras_are_taken_of_what_was_repeated(transfer):
    sections = {"fold": {"loops": 2}, "relax": {"rank": "full", "init": "svd", "vectors": "own"}}
    plan, given, found = transfer({"type": "gla", "transfer": "all"}, **sections)
    assert said(plan, "model.mixers.*.k_proj.weight") == [("averaged", "each key-value head 2 times first")]
    for depth in range(4):
        stored = found[f"model.mixers.{depth % 2}.k_proj.weight"]
        lora = found[f"model.depths.{depth}.lora.k_proj.b"] @ found[f"model.depths.{depth}.lora.k_proj.a"]
        own = given[layer("self_attn.k_proj", depth)].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
        assert torch.allclose(stored + lora, own, atol=1e-5)
        # A fresh linear has nothing to correct.
        assert not found[f"model.depths.{depth}.lora.g_proj.b"].any()


def test_a_window_over_the_whole_context_is_the_source(make_source, tmp_path):
    swap = {"type": "linear_attention", "window": 64}
    tokens = torch.randint(2, 95, (2, 20), generator=torch.Generator().manual_seed(3))
    for variant in ("llama-mha-bias", "mistral-head-dim", "gpt_neox", "qwen3", "olmo2"):
        source = make_source(variant, **({"sliding_window": None} if "mistral" in variant else {}))
        out = tmp_path / variant
        convert(source, out, {"mixers": [swap]}, options=ConvertOptions(allow_larger=True))
        expected, found = (load_model(each, device="cpu")(tokens).logits for each in (source, out))
        assert far(found, expected) < 2e-5
        narrow = tmp_path / f"{variant}-narrow"
        convert(source, narrow, {"mixers": [{**swap, "window": 3}]}, options=ConvertOptions(allow_larger=True))
        away = load_model(narrow, device="cpu")(tokens).logits
        assert far(away, expected) > 2e-3


@pytest.mark.parametrize("variant", ["qwen3", "gemma2", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("swap", [{"type": "retention", "transfer": "all"}, {"type": "linear_attention"}], ids=str)
def test_norms_and_scale_of_every_family_go_with_the_mixer(make_source, tmp_path, variant, swap):
    source = make_source(variant)
    folded = {"fold": {"loops": 2}, "relax": {"rank": "full", "init": "svd", "vectors": "own"}}
    loaded = []
    for name, recipe in (("plain", {}), ("folded", folded)):
        made = convert(source, tmp_path / name, {"mixers": [swap], **recipe}, options=ConvertOptions(allow_larger=True))
        loaded.append(load_model(tmp_path / name, device="cpu"))
    tokens = torch.randint(2, 95, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain, same = (model(tokens).logits for model in loaded)
        # What is taken over is the source's own at each depth; what is new is drawn by each part's name.
        if swap["type"] == "linear_attention":
            assert far(same, plain) < 1e-4
        cached = loaded[1](tokens[:, :9], use_cache=True)
        rest = loaded[1](tokens[:, 9:], past_key_values=cached.past_key_values).logits
    assert far(rest, same[:, 9:]) < 2e-5
    given, found = load_file(source / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    if variant != "qwen3":
        assert torch.equal(given[layer("post_attention_layernorm", 2)], found["model.mixers.2.output_norm.weight"])
    assert ("model.mixers.2.input_norm.weight" in found) == (variant != "olmo2")
    loses = swap["type"] == "retention" and variant != "gemma2"
    note = "mixers: retention takes over q_proj and k_proj without the source's query/key norms"
    assert any(each.startswith(note) for each in map(str, made.notes)) == loses
    dropped = said(made, "model.layers.*.self_attn.q_norm.weight")
    assert dropped == ([("dropped", "not carried over to retention")] if loses else [])


def test_a_window_beside_features_is_refused_where_the_source_caps_its_scores(make_source):
    with pytest.raises(RecipeError, match=r"window: must be 0 where the source caps its attention scores \(got 4\)"):
        make_plan(make_source("gemma2"), {"mixers": [{"type": "linear_attention", "window": 4}]})


def test_kept_depths_keep_the_source(transfer):
    _, given, found = transfer({"type": "retention", "except": [1]})
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert torch.equal(found[f"model.mixers.1.{name}.weight"], given[layer(f"self_attn.{name}", 1)])
