"""Gemma 2: Gemma 1 with sandwich norms, soft-caps, and a window in every other layer."""

from collections.abc import Mapping
from typing import Any

from refold.families import gemma
from refold.families.arch import ArchSpec, Family, Layer, TensorRule
from refold.families.llama import ATTENTION_LINEARS, IGNORED, LAYER, MLP_LINEARS, OUTSIDE, linear_rules
from refold.families.reading import only_rope, read_or, read_rope, read_windows, write_rope, write_windows


def read_config(config: Mapping[str, Any]) -> ArchSpec:
    fields = read_fields(config, max_positions=8192)
    rope = read_rope(config, fields["head_dim"], fields["max_position_embeddings"])
    windows = read_windows(config, config.get("sliding_window", 4096), lambda layer: layer % 2 == 0)
    return ArchSpec(
        family="gemma2",
        **fields,
        layers=tuple(Layer(window=window, rope=rope) for window in windows),
        # The default is for a missing key; null means "no cap".
        attention_softcap=config.get("attn_logit_softcapping", 50.0),
        logit_softcap=config.get("final_logit_softcapping", 30.0),
    )


def read_fields(config: Mapping[str, Any], *, max_positions: int) -> dict[str, Any]:
    """Reads the ArchSpec fields that Gemma 2 and 3 share: all except family, layers and soft-caps."""
    fields = gemma.read_fields(config, "hidden_activation", max_positions=max_positions, kv_heads=4)
    return {
        **fields,
        "attention_scale": read_or(config, "query_pre_attn_scalar", 256) ** -0.5,
        "output_norms": True,
    }


def write_config(arch: ArchSpec) -> dict[str, Any]:
    return {
        **write_fields(arch),
        **write_windows(arch.layers, "gemma2"),
        "attn_logit_softcapping": arch.attention_softcap,
        "rope_parameters": write_rope(only_rope(arch.layers, "gemma2"), arch.head_dim),
    }


def write_fields(arch: ArchSpec) -> dict[str, Any]:
    """Writes the fields that `read_fields` reads, and the soft-cap of the logits."""
    exact = arch.attention_scale**-2
    whole = round(exact)
    return {
        **gemma.write_fields(arch, "hidden_activation"),
        # transformers requires a whole number, but squaring the root may give one with a rounding error.
        "query_pre_attn_scalar": whole if whole**-0.5 == arch.attention_scale else exact,
        "final_logit_softcapping": arch.logit_softcap,
    }


SANDWICH = (
    TensorRule(f"{LAYER}.input_layernorm.weight", ("mixer.input_norm.weight",)),
    TensorRule(f"{LAYER}.post_attention_layernorm.weight", ("mixer.output_norm.weight",)),
    TensorRule(f"{LAYER}.pre_feedforward_layernorm.weight", ("mlp.input_norm.weight",)),
    TensorRule(f"{LAYER}.post_feedforward_layernorm.weight", ("mlp.output_norm.weight",)),
)
RULES = (
    *OUTSIDE,
    *SANDWICH,
    *linear_rules(LAYER, "self_attn", "mixer", ATTENTION_LINEARS),
    *linear_rules(LAYER, "mlp", "mlp", MLP_LINEARS),
)

FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    url="https://arxiv.org/abs/2408.00118",
    read_config=read_config,
    write_config=write_config,
    rules=RULES,
    ignored=IGNORED,
)
