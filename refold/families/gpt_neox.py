"""GPT-NeoX and Pythia: fused query-key-value, LayerNorm, plain MLP, partial rotary, both residual forms."""

from collections.abc import Mapping
from typing import Any

from refold.families.arch import ArchSpec, Family, Norm, TensorRule
from refold.families.llama import linear_rules
from refold.families.reading import (
    only_layer,
    read_activation,
    read_decoder,
    read_or,
    read_rope,
    require,
    rotary_share,
    same_layers,
    write_decoder,
    write_rope,
)


def read_config(config: Mapping[str, Any]) -> ArchSpec:
    sizes = read_decoder(config, max_positions=2048, is_grouped=False)
    rope = read_rope(
        config,
        sizes["head_dim"],
        sizes["max_position_embeddings"],
        theta_key="rotary_emb_base",
        partial=read_or(config, "rotary_pct", 0.25),
    )
    attention_bias = read_or(config, "attention_bias", True)
    return ArchSpec(
        family="gpt_neox",
        **sizes,
        layers=same_layers(require(config, "num_hidden_layers"), None, rope),
        norm=Norm(kind="layer", eps=read_or(config, "layer_norm_eps", 1e-5), bias=True),
        activation=read_activation(config, "hidden_act", "gelu"),
        gated_mlp=False,
        residual="parallel" if read_or(config, "use_parallel_residual", True) else "sequential",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=True,
    )


def write_config(arch: ArchSpec) -> dict[str, Any]:
    layer = only_layer(arch.layers, "gpt_neox")
    assert layer.rope is not None
    # The default of NeoX is a quarter of a head, so the share is always written.
    rope = {**write_rope(layer.rope, arch.head_dim), "partial_rotary_factor": rotary_share(layer.rope, arch.head_dim)}
    return {
        **write_decoder(arch, is_grouped=False),
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
