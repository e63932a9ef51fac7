"""Every field of an ArchSpec changes the outputs of the model, in each family that relies on it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from refold.families.arch import ArchSpec, Norm, Rope
from refold.modeling.configuration import RefoldConfig
from refold.modeling.model import RefoldForCausalLM

TOLERANCE = 2e-5
EDITS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "num_attention_heads", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}),
    ("llama", "activation", {"activation": "gelu"}),
    ("llama", "gated_mlp", {"gated_mlp": False}),
    ("gpt_neox", "residual", {"residual": "sequential"}),
    ("llama", "output_norms", {"output_norms": True}),
    ("llama", "qk_norm", {"qk_norm": "head"}),
    ("llama", "qk_norm", {"qk_norm": "full"}),
    ("gpt_neox", "qkv_bias", {"qkv_bias": False}),
    ("gpt_neox", "o_bias", {"o_bias": False}),
    ("gpt_neox", "mlp_bias", {"mlp_bias": False}),
    ("llama", "attention_scale", {"attention_scale": 1.0}),
    ("llama", "attention_softcap", {"attention_softcap": 2.0}),
    ("llama", "logit_softcap", {"logit_softcap": 3.0}),
    ("gpt_neox", "embedding_scale", {"embedding_scale": 4.0}),
    ("llama-llama3", "tied_head", {"tied_head": False}),
    ("llama", "norm", {"norm": Norm(eps=1.0)}),
    ("llama", "norm", {"norm": Norm(eps=1e-5, offset=1.0)}),
    ("llama", "norm", {"norm": Norm(kind="layer", eps=1e-5)}),
    ("gpt_neox", "norm", {"norm": Norm(kind="layer", eps=1e-5)}),
    ("qwen2", "qkv_bias", {"qkv_bias": False}),
    ("qwen3", "qk_norm", {"qk_norm": "none"}),
    ("qwen3", "o_bias", {"o_bias": False}),
    ("gemma", "norm", {"norm": Norm(float32_scale=True)}),
    ("gemma", "embedding_scale", {"embedding_scale": 1.0}),
    ("gemma", "tied_head", {"tied_head": False}),
    ("gemma", "activation", {"activation": "silu"}),
    ("gemma2", "norm", {"norm": Norm(float32_scale=True)}),
    ("gemma2", "output_norms", {"output_norms": False}),
    ("gemma2", "attention_scale", {"attention_scale": 0.25}),
    ("gemma2", "attention_softcap", {"attention_softcap": None}),
    ("gemma2", "logit_softcap", {"logit_softcap": None}),
    ("gemma3_text", "qk_norm", {"qk_norm": "none"}),
    ("gemma3_text", "norm", {"norm": Norm(float32_scale=True)}),
    ("gemma3_text", "attention_scale", {"attention_scale": 0.25}),
    ("gemma3_text", "embedding_scale", {"embedding_scale": 1.0}),
    ("gemma3_text-v4", "logit_softcap", {"logit_softcap": None}),
    ("olmo2", "input_norms", {"input_norms": True}),
    ("olmo2", "output_norms", {"output_norms": False}),
    ("olmo2", "qk_norm", {"qk_norm": "none"}),
]
# Window and rope of every depth: each family that relies on them, with another.
REACHES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2-window", {"window": None}),
    ("qwen3-window", {"window": 4}),
    ("qwen3-window", {"rope": Rope(theta=50.0, rotary_dim=8)}),
    ("gemma2", {"window": None}),
    ("gemma3_text", {"window": None}),
    ("gemma3_text", {"rope": Rope(theta=1e6, rotary_dim=16)}),
    ("gemma3_text", {"rope": Rope(theta=1e4, rotary_dim=16)}),
    ("gemma3_text-v4", {"rope": Rope(theta=5.0, rotary_dim=16)}),
    ("phi3-window", {"rope": Rope(theta=50.0, rotary_dim=8)}),
    ("phi3-window", {"window": None}),
    ("llama-yarn", {"rope": Rope(theta=50.0, rotary_dim=8)}),
    ("llama-dynamic", {"rope": Rope(theta=50.0, rotary_dim=8)}),
]
WITHOUT_EFFECT = {
    "family": "only reading and export look at it",
    "initializer_range": "only fresh weights do",
    "max_position_embeddings": "only rope kinds that change past it do",
    "layers": "the depths say it again, and are what runs",
    "vocab_size": "a shape: other weights do not load",
    "hidden_size": "a shape",
    "intermediate_size": "a shape",
    "num_key_value_heads": "a shape, tested with num_attention_heads",
    "head_dim": "a shape, tested with num_attention_heads",
}
ROPES = [
    Rope(kind="default", theta=777.0, rotary_dim=8),
    Rope(kind="default", rotary_dim=4),
    Rope(kind="linear", rotary_dim=8, scaling={"factor": 4.0}),
    None,
]


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def rebuilt(model: RefoldForCausalLM, blueprint: dict[str, Any]) -> RefoldForCausalLM:
    """A model of another blueprint, with all weights of `model` that it has a place for."""
    other = RefoldForCausalLM._from_config(RefoldConfig(blueprint=blueprint), attn_implementation="eager").eval()
    fresh, given = other.state_dict(), model.state_dict()
    if model.config.tie_word_embeddings and not other.config.tie_word_embeddings:
        del given["lm_head.weight"]
    other.load_state_dict({name: given.get(name, fresh[name]) for name in fresh})
    return other


def test_every_field_is_controlled():
    assert {field for _, field, _ in EDITS} | WITHOUT_EFFECT.keys() == ArchSpec.model_fields.keys()


@pytest.mark.parametrize(("variant", "field", "change"), EDITS, ids=lambda value: str(value)[:60])
@torch.no_grad()
def test_a_changed_field_moves_the_logits(load, tokens, variant, field, change):
    model = load(variant, attn="eager")
    blueprint = model.config.read_blueprint()
    expected = model(tokens).logits
    same = rebuilt(model, blueprint.model_dump(mode="json"))
    assert torch.equal(same(tokens).logits, expected)
    arch = ArchSpec.model_validate({**dict(blueprint.arch), **change})
    assert getattr(arch, field) != getattr(blueprint.arch, field)
    moved = rebuilt(model, blueprint.model_copy(update={"arch": arch}).model_dump(mode="json"))
    assert difference(moved(tokens).logits, expected) > 100 * TOLERANCE


@torch.no_grad()
def test_one_gelu_does_not_pass_for_another(load, tokens):
    model = load("llama-mha-bias", attn="eager")
    blueprint = model.config.read_blueprint()
    arch = blueprint.arch.model_copy(update={"activation": "gelu"})
    other = rebuilt(model, blueprint.model_copy(update={"arch": arch}).model_dump(mode="json"))
    # They differ by 4e-4 at most.
    assert difference(other(tokens).logits, model(tokens).logits) > 20 * TOLERANCE


@pytest.mark.parametrize(
    ("variant", "change"),
    [*(("llama", {"rope": rope}) for rope in ROPES), ("llama", {"window": 3}), *REACHES],
    ids=lambda value: str(value)[:80],
)
@torch.no_grad()
def test_a_depths_rope_and_window_move_the_logits(load, tokens, variant, change):
    model = load(variant, attn="eager")
    blueprint = model.config.read_blueprint()
    depths = tuple(depth.model_copy(update=change) for depth in blueprint.depths)
    moved = rebuilt(model, blueprint.model_copy(update={"depths": depths}).model_dump(mode="json"))
    assert difference(moved(tokens).logits, model(tokens).logits) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("variant", "norm", "rope"),
    [
        ("olmo2", {"float32_scale": False}, {}),
        ("olmo2", {}, {"float32_turn": False}),
        ("gemma", {"float32_scale": False}, {}),
        ("llama", {"float32_scale": True}, {}),
        ("llama", {}, {"float32_turn": True}),
    ],
)
@torch.no_grad()
def test_where_half_precision_is_rounded_shows(load, tokens, variant, norm, rope):
    model = load(variant, dtype="bfloat16")
    blueprint = model.config.read_blueprint()
    arch = blueprint.arch.model_copy(update={"norm": blueprint.arch.norm.model_copy(update=norm)})
    depths = tuple(depth.model_copy(update={"rope": depth.rope.model_copy(update=rope)}) for depth in blueprint.depths)
    changed = blueprint.model_copy(update={"arch": arch, "depths": depths}).model_dump(mode="json")
    same, other = (rebuilt(model, each).bfloat16() for each in (blueprint.model_dump(mode="json"), changed))
    assert not torch.equal(same(tokens).logits, other(tokens).logits)


def test_soft_capped_attention_takes_the_eager_back_end_by_itself(load):
    assert load("gemma2").config._attn_implementation == "eager"
    assert load("gemma2-v4").config._attn_implementation == "sdpa"
