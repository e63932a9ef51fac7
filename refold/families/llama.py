"""Llama (1 to 3, TinyLlama and what shares the layout)."""

from collections.abc import Mapping
from typing import Any

from refold.families.arch import ArchSpec, Norm
from refold.families.family import Family, TensorRule
from refold.families.reading import (
    only_layer,
    read_activation,
    read_or,
    read_rope,
    read_size,
    require,
    same_layers,
    write_rope,
)


def read_config(config: Mapping[str, Any]) -> ArchSpec:
    hidden_size = require(config, "hidden_size")
    heads = require(config, "num_attention_heads")
    head_dim = read_size(config, "head_dim", hidden_size // heads)
    attention_bias = read_or(config, "attention_bias", False)
    max_positions = read_size(config, "max_position_embeddings", 2048)
    rope = read_rope(config, head_dim, max_positions)
    return ArchSpec(
        family="llama",
        vocab_size=require(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=require(config, "intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=read_size(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        layers=same_layers(require(config, "num_hidden_layers"), None, rope),
        norm=Norm(kind="rms", eps=read_or(config, "rms_norm_eps", 1e-6)),
        activation=read_activation(config, "hidden_act", "silu"),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=read_or(config, "mlp_bias", False),
        attention_scale=head_dim**-0.5,
        tied_head=read_or(config, "tie_word_embeddings", False),
        initializer_range=read_or(config, "initializer_range", 0.02),
    )


def write_config(arch: ArchSpec) -> dict[str, Any]:
    layer = only_layer(arch.layers, "llama")
    assert layer.rope is not None
    return {
        **decoder_fields(arch),
        "attention_bias": arch.qkv_bias,
        "mlp_bias": arch.mlp_bias,
        "rms_norm_eps": arch.norm.eps,
        "rope_parameters": write_rope(layer.rope, arch.head_dim),
    }


def decoder_fields(arch: ArchSpec) -> dict[str, Any]:
    """The fields that every gated, grouped-query decoder of transformers names alike."""
    return {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_key_value_heads,
        "head_dim": arch.head_dim,
        "hidden_act": arch.activation,
        "max_position_embeddings": arch.max_position_embeddings,
        "tie_word_embeddings": arch.tied_head,
        "initializer_range": arch.initializer_range,
    }


def linear_rules(layer: str, source: str, canonical: str, names: Mapping[str, str]) -> tuple[TensorRule, ...]:
    """Rules for weight and bias of unfused linears: `names` maps a source's name to the canonical one."""
    return tuple(
        TensorRule(f"{layer}.{source}.{name}.{kind}", (f"{canonical}.{ours}.{kind}",))
        for name, ours in names.items()
        for kind in ("weight", "bias")
    )


ATTENTION_LINEARS = {name: name for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
MLP_LINEARS = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
LAYER = "model.layers.{layer}"

RULES = (
    TensorRule("model.embed_tokens.weight", ("embed_tokens.weight",)),
    TensorRule("model.norm.weight", ("norm.weight",)),
    TensorRule("lm_head.weight", ("lm_head.weight",)),
    TensorRule(f"{LAYER}.input_layernorm.weight", ("mixer.input_norm.weight",)),
    TensorRule(f"{LAYER}.post_attention_layernorm.weight", ("mlp.input_norm.weight",)),
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
