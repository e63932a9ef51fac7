"""Llama 1 to 3, TinyLlama and other models with the same layout."""

from collections.abc import Mapping
from typing import Any

from refold.families.arch import ArchSpec, Family, Norm, TensorRule
from refold.families.reading import (
    only_layer,
    read_activation,
    read_decoder,
    read_or,
    read_rope,
    require,
    same_layers,
    write_decoder,
    write_rope,
)


def read_config(config: Mapping[str, Any]) -> ArchSpec:
    sizes = read_decoder(config, max_positions=2048)
    rope = read_rope(config, sizes["head_dim"], sizes["max_position_embeddings"])
    attention_bias = read_or(config, "attention_bias", False)
    return ArchSpec(
        family="llama",
        **sizes,
        layers=same_layers(require(config, "num_hidden_layers"), None, rope),
        norm=Norm(kind="rms", eps=read_or(config, "rms_norm_eps", 1e-6)),
        activation=read_activation(config, "hidden_act", "silu"),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=read_or(config, "mlp_bias", False),
    )


def write_config(arch: ArchSpec) -> dict[str, Any]:
    layer = only_layer(arch.layers, "llama")
    assert layer.rope is not None
    return {
        **write_decoder(arch),
        "attention_bias": arch.qkv_bias,
        "mlp_bias": arch.mlp_bias,
        "rms_norm_eps": arch.norm.eps,
        "rope_parameters": write_rope(layer.rope, arch.head_dim),
    }


def linear_rules(layer: str, source: str, canonical: str, names: Mapping[str, str]) -> tuple[TensorRule, ...]:
    """Returns rules for weight and bias of unfused linears; `names` maps source names to canonical names."""
    return tuple(
        TensorRule(f"{layer}.{source}.{name}.{kind}", (f"{canonical}.{ours}.{kind}",))
        for name, ours in names.items()
        for kind in ("weight", "bias")
    )


ATTENTION_LINEARS = {name: name for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
MLP_LINEARS = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
LAYER = "model.layers.{layer}"

OUTSIDE = (
    TensorRule("model.embed_tokens.weight", ("embed_tokens.weight",)),
    TensorRule("model.norm.weight", ("norm.weight",)),
    TensorRule("lm_head.weight", ("lm_head.weight",)),
)
INPUT_NORMS = (
    TensorRule(f"{LAYER}.input_layernorm.weight", ("mixer.input_norm.weight",)),
    TensorRule(f"{LAYER}.post_attention_layernorm.weight", ("mlp.input_norm.weight",)),
)
RULES = (
    *OUTSIDE,
    *INPUT_NORMS,
    *linear_rules(LAYER, "self_attn", "mixer", ATTENTION_LINEARS),
    *linear_rules(LAYER, "mlp", "mlp", MLP_LINEARS),
)
IGNORED = {"model.layers.*.self_attn.rotary_emb.inv_freq": "computed from the config"}

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    url="https://arxiv.org/abs/2302.13971",
    read_config=read_config,
    write_config=write_config,
    rules=RULES,
    ignored=IGNORED,
)
