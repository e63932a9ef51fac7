"""Every field of an ArchSpec changes what the model computes; those no family sets yet, against a reference."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from refold.blueprint.build import identity_blueprint
from refold.families.arch import ArchSpec, Layer, Norm, Rope
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


@pytest.mark.parametrize("change", [*({"rope": rope} for rope in ROPES), {"window": 3}], ids=str)
@torch.no_grad()
def test_a_depths_rope_and_window_move_the_logits(load, tokens, change):
    model = load("llama", attn="eager")
    blueprint = model.config.read_blueprint()
    depths = tuple(depth.model_copy(update=change) for depth in blueprint.depths)
    moved = rebuilt(model, blueprint.model_copy(update={"depths": depths}).model_dump(mode="json"))
    assert difference(moved(tokens).logits, model(tokens).logits) > 100 * TOLERANCE


FUTURE: dict[str, dict[str, Any]] = {
    "gemma 2": {
        "norm": Norm(offset=1.0),
        "output_norms": True,
        "attention_softcap": 3.0,
        "logit_softcap": 4.0,
        "embedding_scale": math.sqrt(24),
        "tied_head": True,
        "activation": "gelu_pytorch_tanh",
        "attention_scale": 0.2,
    },
    "qwen 3": {"norm": Norm(), "qk_norm": "head", "qkv_bias": True},
    "olmo 2": {"norm": Norm(), "qk_norm": "full", "output_norms": True},
    "gemma 3": {"norm": Norm(offset=1.0), "qk_norm": "head", "output_norms": True, "tied_head": True},
}


def future_arch(**fields: Any) -> ArchSpec:
    rope, local = Rope(rotary_dim=8), Rope(rotary_dim=8, theta=100.0)
    return ArchSpec.model_validate(
        {
            "family": "llama",
            "vocab_size": 40,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "layers": (Layer(window=4, rope=local), Layer(window=None, rope=rope)),
            "activation": "silu",
            "attention_scale": 8**-0.5,
            **fields,
        }
    )


def reference_norm(x: Tensor, weights: dict[str, Tensor], name: str, norm: Norm) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + norm.eps) * (norm.offset + weights[f"{name}.weight"])


def reference_turn(x: Tensor, rope: Rope) -> Tensor:
    """Rotation as a product of complex numbers."""
    tokens, half = x.shape[0], rope.rotary_dim // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] / rope.theta**exponents
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def reference_attention(x: Tensor, weights: dict[str, Tensor], arch: ArchSpec, layer: Layer) -> Tensor:
    """Attention of one row `[T, D]`, one head and one query after the other."""
    assert layer.rope is not None
    states = {}
    for name in ("q", "k", "v"):
        y = x @ weights[f"{name}_proj.weight"].T
        if arch.qkv_bias:
            y = y + weights[f"{name}_proj.bias"]
        if name != "v" and arch.qk_norm == "full":
            y = reference_norm(y, weights, f"{name}_norm", arch.norm)
        y = y.reshape(len(x), -1, arch.head_dim)
        if name != "v" and arch.qk_norm == "head":
            y = reference_norm(y, weights, f"{name}_norm", arch.norm)
        states[name] = y if name == "v" else reference_turn(y, layer.rope)
    out = torch.zeros(len(x), arch.num_attention_heads, arch.head_dim, dtype=x.dtype)
    for head in range(arch.num_attention_heads):
        group = head // (arch.num_attention_heads // arch.num_key_value_heads)
        for at in range(len(x)):
            first = 0 if layer.window is None else max(0, at - layer.window + 1)
            scores = states["k"][first : at + 1, group] @ states["q"][at, head] * arch.attention_scale
            if arch.attention_softcap is not None:
                scores = arch.attention_softcap * torch.tanh(scores / arch.attention_softcap)
            out[at, head] = torch.softmax(scores, dim=0) @ states["v"][first : at + 1, group]
    return out.flatten(1) @ weights["o_proj.weight"].T


def reference_mlp(x: Tensor, weights: dict[str, Tensor], arch: ArchSpec) -> Tensor:
    gate, up = (x @ weights[f"{name}.weight"].T for name in ("gate_proj", "up_proj"))
    if arch.activation == "silu":
        act = gate * torch.sigmoid(gate)
    else:
        act = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return (act * up) @ weights["down_proj.weight"].T


def reference_logits(model: RefoldForCausalLM, arch: ArchSpec, row: Tensor) -> Tensor:
    """The forward pass written a second time, plainly, in float64."""
    x = model.get_input_embeddings().state_dict()["weight"][row] * arch.embedding_scale
    for index, layer in enumerate(arch.layers):
        for pool in (model.model.mixers, model.model.mlps):
            weights = pool[index].state_dict()
            y = reference_norm(x, weights, "input_norm", arch.norm)
            y = (
                reference_attention(y, weights, arch, layer)
                if "q_proj.weight" in weights
                else reference_mlp(y, weights, arch)
            )
            x = x + (reference_norm(y, weights, "output_norm", arch.norm) if arch.output_norms else y)
    logits = reference_norm(x, model.model.state_dict(), "norm", arch.norm) @ model.lm_head.weight.T
    return logits if arch.logit_softcap is None else arch.logit_softcap * torch.tanh(logits / arch.logit_softcap)


@pytest.mark.parametrize("kind", FUTURE)
@torch.no_grad()
def test_fields_of_families_to_come_compute_what_they_say(kind):
    arch = future_arch(**FUTURE[kind])
    config = RefoldConfig(blueprint=identity_blueprint(arch).model_dump(mode="json"))
    model = RefoldForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(2)
    for weight in model.parameters():
        weight.add_(0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    row = torch.randint(0, 40, (12,), generator=generator)
    given = model(row[None]).logits[0]
    expected = reference_logits(model, arch, row)
    assert difference(given, expected) < TOLERANCE
    for field in FUTURE[kind]:
        if field == "tied_head":
            continue
        plain = {**FUTURE[kind], field: ArchSpec.model_fields[field].default}
        plain |= {name: value for name, value in (("activation", "silu"), ("attention_scale", 1.0)) if name == field}
        plain |= {"norm": Norm(eps=0.5)} if field == "norm" else {}
        assert difference(reference_logits(model, future_arch(**plain), row), expected) > 100 * TOLERANCE, field


@torch.no_grad()
def test_soft_capped_attention_takes_the_eager_back_end_by_itself():
    arch = future_arch(norm=Norm(), attention_softcap=3.0)
    model = RefoldForCausalLM(RefoldConfig(blueprint=identity_blueprint(arch).model_dump(mode="json")))
    assert model.config._attn_implementation == "eager"
    plain = future_arch(norm=Norm())
    model = RefoldForCausalLM(RefoldConfig(blueprint=identity_blueprint(plain).model_dump(mode="json")))
    assert model.config._attn_implementation == "sdpa"
