"""Qwen3: Qwen2 without biases, and with query/key norms over each head."""

from collections.abc import Mapping
from typing import Any

from refold.families import qwen2
from refold.families.arch import ArchSpec, Family, TensorRule
from refold.families.llama import IGNORED, LAYER, RULES
from refold.families.reading import read_or


def read_config(config: Mapping[str, Any]) -> ArchSpec:
    attention_bias = read_or(config, "attention_bias", False)
    return ArchSpec(
        family="qwen3",
        **qwen2.read_fields(config, head_dim=128),
        qk_norm="head",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
    )


def write_config(arch: ArchSpec) -> dict[str, Any]:
    return {**qwen2.write_config(arch), "attention_bias": arch.qkv_bias}


QK_NORMS = tuple(
    TensorRule(f"{LAYER}.self_attn.{name}.weight", (f"mixer.{name}.weight",)) for name in ("q_norm", "k_norm")
)

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    url="https://arxiv.org/abs/2505.09388",
    read_config=read_config,
    write_config=write_config,
    rules=(*RULES, *QK_NORMS),
    ignored=IGNORED,
)
