"""Gemma 1: norms that store `weight - 1`, scaled embeddings, a tied head."""

from collections.abc import Mapping
from typing import Any

from refold.errors import SourceError
from refold.families.arch import ArchSpec, Family, Norm
from refold.families.llama import IGNORED, RULES
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
    fields = read_fields(config, "hidden_act", max_positions=8192, kv_heads=16)
    rope = read_rope(config, fields["head_dim"], fields["max_position_embeddings"])
    # The first released configs say `gelu`, but the models use the tanh approximation.
    activation = "gelu_pytorch_tanh" if fields["activation"] == "gelu" else fields["activation"]
    return ArchSpec(
        family="gemma",
        **{**fields, "activation": activation},
        layers=same_layers(require(config, "num_hidden_layers"), None, rope),
    )


def read_fields(config: Mapping[str, Any], activation_key: str, *, max_positions: int, kv_heads: int) -> dict[str, Any]:
    """Reads the ArchSpec fields that all Gemma families share: all except family and layers.

    Raises:
        SourceError: Attention is bidirectional, or a size is missing or not a positive whole number.
    """
    if config.get("use_bidirectional_attention"):
        raise SourceError(
            "config.json: use_bidirectional_attention must be false (got true: a model whose tokens see later tokens "
            "cannot generate); take a causal model"
        )
    sizes = read_decoder(config, max_positions=max_positions, kv_heads=kv_heads, head_dim=256, is_tied=True)
    attention_bias = read_or(config, "attention_bias", False)
    return {
        **sizes,
        "norm": Norm(kind="rms", eps=read_or(config, "rms_norm_eps", 1e-6), offset=1.0, float32_scale=True),
        "activation": read_activation(config, activation_key, "gelu_pytorch_tanh"),
        "embedding_scale": sizes["hidden_size"] ** 0.5,
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
    }


def write_config(arch: ArchSpec) -> dict[str, Any]:
    layer = only_layer(arch.layers, "gemma")
    assert layer.rope is not None
    return {**write_fields(arch, "hidden_act"), "rope_parameters": write_rope(layer.rope, arch.head_dim)}


def write_fields(arch: ArchSpec, activation_key: str) -> dict[str, Any]:
    """Writes the fields that `read_fields` reads."""
    return {
        **write_decoder(arch, activation_key=activation_key),
        "attention_bias": arch.qkv_bias,
        "rms_norm_eps": arch.norm.eps,
    }


FAMILY = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    url="https://arxiv.org/abs/2403.08295",
    read_config=read_config,
    write_config=write_config,
    rules=RULES,
    ignored=IGNORED,
)
