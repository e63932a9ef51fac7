"""Softmax attention: multi-head, grouped-query, with optional biases and query/key norms."""

from collections.abc import Mapping
from typing import Any, Literal

from refold.families.arch import ArchSpec
from refold.fields import Count
from refold.mixers.placement import MixerSwap, Transfer
from refold.mixers.spec import PartSpec, Shape, outer_norms


class Attention(MixerSwap):
    """Keeps softmax attention, within a window if asked."""

    type: Literal["attention"] = "attention"
    transfer: Transfer = "all"
    """What is taken over from the source's layer besides its norms."""
    window: Count | None = None
    """So many latest tokens, itself included, are attended to; left out: what the source looks at."""

    def options(self) -> dict[str, Any]:
        """Returns none: a window is the depth's, so that depths with different ones can share a part."""
        return {}

    def looks_back(self, source_window: int | None) -> int | None:
        """Returns its window, or the source's."""
        return self.window or source_window


def linears(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    queries = arch.num_attention_heads * arch.head_dim
    keys = arch.num_key_value_heads * arch.head_dim
    return {
        "q_proj": (queries, arch.hidden_size),
        "k_proj": (keys, arch.hidden_size),
        "v_proj": (keys, arch.hidden_size),
        "o_proj": (arch.hidden_size, queries),
    }


def biases(arch: ArchSpec, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Shape]:
    """The biases that the source's attention has, on projections of any shapes."""
    biased = (("q_proj", "k_proj", "v_proj") if arch.qkv_bias else ()) + (("o_proj",) if arch.o_bias else ())
    return {f"{name}.bias": (shapes[name][0],) for name in biased}


def vectors(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, Shape]:
    shapes = linears(arch, options)
    found = outer_norms(arch) | biases(arch, shapes)
    if arch.qk_norm != "none":
        whole = arch.qk_norm == "full"
        found["q_norm.weight"] = (shapes["q_proj"][0] if whole else arch.head_dim,)
        found["k_norm.weight"] = (shapes["k_proj"][0] if whole else arch.head_dim,)
    return found


def score_flops(arch: ArchSpec, options: Mapping[str, Any]) -> int:
    # One multiply-add for the score and one for the weighted value, for each head dimension.
    return 4 * arch.num_attention_heads * arch.head_dim


def cached_numbers(arch: ArchSpec, options: Mapping[str, Any]) -> int:
    return 2 * arch.num_key_value_heads * arch.head_dim


SPEC = PartSpec(
    name="attention",
    url="https://arxiv.org/abs/1706.03762",
    linears=linears,
    vectors=vectors,
    flops_per_context_token=score_flops,
    cache_elements_per_token=cached_numbers,
    key_value_names=frozenset({"k_proj", "v_proj", "k_norm"}),
)
