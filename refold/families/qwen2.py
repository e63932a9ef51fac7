"""Qwen2 and Qwen2.5: Llama's layout with biases on queries, keys and values, and windows in the upper layers."""

from collections.abc import Mapping
from typing import Any

from refold.families.arch import ArchSpec, Family, Layer, Norm
from refold.families.llama import IGNORED, RULES
from refold.families.reading import (
    only_rope,
    read_activation,
    read_decoder,
    read_or,
    read_rope,
    read_windows,
    write_decoder,
    write_rope,
    write_windows,
)


def read_config(config: Mapping[str, Any]) -> ArchSpec:
    return ArchSpec(family="qwen2", **read_fields(config), qkv_bias=True)


def read_fields(config: Mapping[str, Any], head_dim: int | None = None) -> dict[str, Any]:
    """Reads the ArchSpec fields that Qwen2 and Qwen3 share; `head_dim` is the default of a missing `head_dim`."""
    sizes = read_decoder(config, max_positions=32768, kv_heads=32, head_dim=head_dim)
    rope = read_rope(config, sizes["head_dim"], sizes["max_position_embeddings"])
    slides = read_or(config, "use_sliding_window", False)
    window = config.get("sliding_window", 4096) if slides else None
    first = read_or(config, "max_window_layers", 28)
    windows = read_windows(config, window, lambda layer: window is not None and layer >= first)
    return {
        **sizes,
        "layers": tuple(Layer(window=each, rope=rope) for each in windows),
        "norm": Norm(kind="rms", eps=read_or(config, "rms_norm_eps", 1e-6)),
        "activation": read_activation(config, "hidden_act", "silu"),
    }


def write_config(arch: ArchSpec) -> dict[str, Any]:
    windows = write_windows(arch.layers, arch.family)
    return {
        **write_decoder(arch),
        **windows,
        "use_sliding_window": windows["sliding_window"] is not None,
        "rms_norm_eps": arch.norm.eps,
        "rope_parameters": write_rope(only_rope(arch.layers, arch.family), arch.head_dim),
    }


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    url="https://arxiv.org/abs/2407.10671",
    read_config=read_config,
    write_config=write_config,
    rules=RULES,
    ignored=IGNORED,
)
