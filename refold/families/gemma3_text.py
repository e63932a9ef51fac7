"""Gemma 3 without vision: Gemma 2 with query/key norms instead of soft-caps, and another rope in local layers."""

from collections.abc import Mapping
from typing import Any

from refold.errors import SourceError
from refold.families import gemma2
from refold.families.arch import ArchSpec, Family, Layer, Rope
from refold.families.llama import IGNORED
from refold.families.qwen3 import QK_NORMS
from refold.families.reading import LAYER_TYPES, read_or, read_rope, read_windows, write_rope, write_windows

GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4


def read_config(config: Mapping[str, Any]) -> ArchSpec:
    fields = gemma2.read_fields(config, max_positions=131072)
    pattern = read_or(config, "sliding_window_pattern", 6)
    windows = read_windows(config, config.get("sliding_window", 4096), lambda layer: (layer + 1) % pattern != 0)
    local, everywhere = (_read_rope(config, fields, is_local) for is_local in (True, False))
    return ArchSpec(
        family="gemma3_text",
        **fields,
        layers=tuple(Layer(window=window, rope=local if window else everywhere) for window in windows),
        qk_norm="head",
        # transformers ignores the config's soft-cap of the attention scores.
        logit_softcap=config.get("final_logit_softcapping"),
    )


def _read_rope(config: Mapping[str, Any], fields: Mapping[str, Any], is_local: bool) -> Rope:
    """Reads one of the two ropes: `rope_parameters` by layer type (v5), or bases beside each other (v4)."""
    given = dict((config.get("rope_parameters") or {}).get(LAYER_TYPES[is_local]) or {})
    # The scaling in v4 configs is for global layers only.
    scaling = {} if is_local else config.get("rope_scaling") or {}
    bases = {"rope_theta": config.get("rope_local_base_freq" if is_local else "rope_theta")}
    return read_rope(
        {**bases, "rope_parameters": {**given, **scaling}},
        fields["head_dim"],
        fields["max_position_embeddings"],
        default_theta=LOCAL_THETA if is_local else GLOBAL_THETA,
    )


def write_config(arch: ArchSpec) -> dict[str, Any]:
    return {
        **gemma2.write_fields(arch),
        **write_windows(arch.layers, "gemma3_text"),
        "rope_parameters": {
            LAYER_TYPES[is_local]: write_rope(_only_rope(arch, is_local), arch.head_dim) for is_local in (True, False)
        },
    }


def _only_rope(arch: ArchSpec, is_local: bool) -> Rope:
    """Returns the rope of all local or of all global layers; the family's default if there are no such layers."""
    ropes = {layer.rope for layer in arch.layers if (layer.window is not None) == is_local}
    usual = Rope(theta=LOCAL_THETA if is_local else GLOBAL_THETA, rotary_dim=arch.head_dim)
    rope, *others = ropes or {usual}
    if others or rope is None:
        where = "with a window" if is_local else "without a window"
        raise SourceError(f"gemma3_text: all layers {where} must have one rope to be written as gemma3_text")
    return rope


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    url="https://arxiv.org/abs/2503.19786",
    read_config=read_config,
    write_config=write_config,
    rules=(*gemma2.RULES, *QK_NORMS),
    ignored=IGNORED,
)
