"""Phi-3 and Phi-4: Llama with fused query-key-value and gate-up linears, and partial rotary embedding."""

from collections.abc import Mapping
from typing import Any

from refold.errors import SourceError
from refold.families.arch import ArchSpec, Family, Norm, TensorRule
from refold.families.llama import IGNORED, INPUT_NORMS, LAYER, OUTSIDE
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

# In these configs transformers reads `su` and `yarn` as `longrope`.
LONG_ROPES = ("longrope", "su", "yarn")


def read_config(config: Mapping[str, Any]) -> ArchSpec:
    _refuse_long_rope(config)
    sizes = read_decoder(config, max_positions=4096)
    rope = read_rope(
        config,
        sizes["head_dim"],
        sizes["max_position_embeddings"],
        partial=read_or(config, "partial_rotary_factor", 1.0),
        kinds=("default",),
    )
    return ArchSpec(
        family="phi3",
        **sizes,
        layers=same_layers(require(config, "num_hidden_layers"), config.get("sliding_window"), rope),
        norm=Norm(kind="rms", eps=read_or(config, "rms_norm_eps", 1e-5)),
        activation=read_activation(config, "hidden_act", "silu"),
    )


def _refuse_long_rope(config: Mapping[str, Any]) -> None:
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = given.get("rope_type") or given.get("type")
    if kind in LONG_ROPES:
        raise SourceError(
            f"config.json: rope kind must be default for phi3 (got {kind!r}, which changes cached keys as the text "
            f"grows); take a model without it, such as Phi-3-mini-4k or Phi-4"
        )


def write_config(arch: ArchSpec) -> dict[str, Any]:
    layer = only_layer(arch.layers, "phi3")
    assert layer.rope is not None
    return {
        **write_decoder(arch),
        # If the key is missing, transformers assumes 4096 and drops the cache once at that length.
        "original_max_position_embeddings": arch.max_position_embeddings,
        "sliding_window": layer.window,
        "rms_norm_eps": arch.norm.eps,
        "rope_parameters": write_rope(layer.rope, arch.head_dim),
    }


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    url="https://arxiv.org/abs/2404.14219",
    read_config=read_config,
    write_config=write_config,
    rules=(
        *OUTSIDE,
        *INPUT_NORMS,
        TensorRule(
            f"{LAYER}.self_attn.qkv_proj.weight",
            ("mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight"),
            "rows",
        ),
        TensorRule(f"{LAYER}.self_attn.o_proj.weight", ("mixer.o_proj.weight",)),
        TensorRule(f"{LAYER}.mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "rows"),
        TensorRule(f"{LAYER}.mlp.down_proj.weight", ("mlp.down_proj.weight",)),
    ),
    ignored=IGNORED,
)
