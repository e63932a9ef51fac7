"""GPT-NeoX and Pythia: fused query-key-value, LayerNorm, plain MLP, partial rotary, both residual forms."""

from collections.abc import Mapping
from typing import Any

from refold.families.arch import ArchSpec, Norm
from refold.families.family import Family, TensorRule
from refold.families.llama import linear_rules
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
    head_dim = hidden_size // heads
    attention_bias = read_or(config, "attention_bias", True)
    max_positions = read_size(config, "max_position_embeddings", 2048)
    rope = read_rope(
        config, head_dim, max_positions, theta_key="rotary_emb_base", partial=read_or(config, "rotary_pct", 0.25)
    )
    return ArchSpec(
        family="gpt_neox",
        vocab_size=require(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=require(config, "intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        layers=same_layers(require(config, "num_hidden_layers"), None, rope),
        norm=Norm(kind="layer", eps=read_or(config, "layer_norm_eps", 1e-5), bias=True),
        activation=read_activation(config, "hidden_act", "gelu"),
        gated_mlp=False,
        residual="parallel" if read_or(config, "use_parallel_residual", True) else "sequential",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=True,
        attention_scale=head_dim**-0.5,
        tied_head=read_or(config, "tie_word_embeddings", False),
        initializer_range=read_or(config, "initializer_range", 0.02),
    )


def write_config(arch: ArchSpec) -> dict[str, Any]:
    layer = only_layer(arch.layers, "gpt_neox")
    assert layer.rope is not None
    # NeoX rotates a quarter of a head unless told otherwise, so the share is always written.
    rope = {**write_rope(layer.rope, arch.head_dim), "partial_rotary_factor": layer.rope.rotary_dim / arch.head_dim}
    return {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "hidden_act": arch.activation,
        "max_position_embeddings": arch.max_position_embeddings,
        "tie_word_embeddings": arch.tied_head,
        "initializer_range": arch.initializer_range,
        "layer_norm_eps": arch.norm.eps,
        "use_parallel_residual": arch.residual == "parallel",
        "attention_bias": arch.qkv_bias,
        "rope_parameters": rope,
    }


LAYER = "gpt_neox.layers.{layer}"


def _weight_and_bias(source: str, *pieces: str, layout: Any = "whole") -> tuple[TensorRule, ...]:
    return tuple(
        TensorRule(f"{source}.{kind}", tuple(f"{piece}.{kind}" for piece in pieces), layout)
        for kind in ("weight", "bias")
    )


FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    url="https://arxiv.org/abs/2204.06745",
    read_config=read_config,
    write_config=write_config,
    rules=(
        TensorRule("gpt_neox.embed_in.weight", ("embed_tokens.weight",)),
        TensorRule("embed_out.weight", ("lm_head.weight",)),
        *_weight_and_bias("gpt_neox.final_layer_norm", "norm"),
        *_weight_and_bias(f"{LAYER}.input_layernorm", "mixer.input_norm"),
        *_weight_and_bias(f"{LAYER}.post_attention_layernorm", "mlp.input_norm"),
        *_weight_and_bias(
            f"{LAYER}.attention.query_key_value", "mixer.q_proj", "mixer.k_proj", "mixer.v_proj", layout="heads"
        ),
        *linear_rules(LAYER, "attention", "mixer", {"dense": "o_proj"}),
        *linear_rules(LAYER, "mlp", "mlp", {"dense_h_to_4h": "up_proj", "dense_4h_to_h": "down_proj"}),
    ),
    ignored={
        "gpt_neox.layers.*.attention.bias": "a causal mask, not a weight",
        "gpt_neox.layers.*.attention.masked_bias": "a constant, not a weight",
        "gpt_neox.layers.*.attention.rotary_emb.inv_freq": "computed from the config",
    },
)
