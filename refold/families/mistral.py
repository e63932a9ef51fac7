"""Mistral: Llama's layout with a sliding window and no biases."""

from collections.abc import Mapping
from typing import Any

from refold.families.arch import ArchSpec, Norm
from refold.families.family import Family
from refold.families.llama import IGNORED, RULES, decoder_fields
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
    # The default window holds only where the key is missing: null says "no window".
    window = config.get("sliding_window", 4096)
    max_positions = read_size(config, "max_position_embeddings", 4096 * 32)
    rope = read_rope(config, head_dim, max_positions)
    return ArchSpec(
        family="mistral",
        vocab_size=require(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=require(config, "intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=read_size(config, "num_key_value_heads", heads if "num_key_value_heads" in config else 8),
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        layers=same_layers(require(config, "num_hidden_layers"), window, rope),
        norm=Norm(kind="rms", eps=read_or(config, "rms_norm_eps", 1e-6)),
        activation=read_activation(config, "hidden_act", "silu"),
        attention_scale=head_dim**-0.5,
        tied_head=read_or(config, "tie_word_embeddings", False),
        initializer_range=read_or(config, "initializer_range", 0.02),
    )


def write_config(arch: ArchSpec) -> dict[str, Any]:
    layer = only_layer(arch.layers, "mistral")
    assert layer.rope is not None
    return {
        **decoder_fields(arch),
        "sliding_window": layer.window,
        "rms_norm_eps": arch.norm.eps,
        "rope_parameters": write_rope(layer.rope, arch.head_dim),
    }


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    url="https://arxiv.org/abs/2310.06825",
    read_config=read_config,
    write_config=write_config,
    rules=RULES,
    ignored=IGNORED,
)
