"""Mistral: Llama's layout with a sliding window and no biases."""

from collections.abc import Mapping
from typing import Any

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
    sizes = read_decoder(config, max_positions=4096 * 32, kv_heads=8)
    rope = read_rope(config, sizes["head_dim"], sizes["max_position_embeddings"])
    # The default is for a missing key; null means "no window".
    window = config.get("sliding_window", 4096)
    return ArchSpec(
        family="mistral",
        **sizes,
        layers=same_layers(require(config, "num_hidden_layers"), window, rope),
        norm=Norm(kind="rms", eps=read_or(config, "rms_norm_eps", 1e-6)),
        activation=read_activation(config, "hidden_act", "silu"),
    )


def write_config(arch: ArchSpec) -> dict[str, Any]:
    layer = only_layer(arch.layers, "mistral")
    assert layer.rope is not None
    return {
        **write_decoder(arch),
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
