"""Softmax attention: multi-head or grouped-query, with optional biases, query/key norms and a window."""

from collections.abc import Mapping
from typing import Literal

from refold.families.arch import ArchSpec
from refold.fields import Count
from refold.mixers.spec import Carried, MixerSpec, Shape, outer_norms


class Attention(MixerSpec):
    """Keeps the softmax attention of the source, optionally within a window."""

    url = "https://arxiv.org/abs/1706.03762"
    is_native = True
    key_value_names = frozenset({"k_proj", "v_proj", "k_norm"})
    transfers_all = True

    type: Literal["attention"] = "attention"
    window: Count | None = None
    """Number of latest tokens that a token attends to, itself included. Default: as in the source."""

    def resolve(self, arch: ArchSpec, where: str) -> "Attention":
        """Returns attention without `window`. The depth keeps the window, so that depths of any window share a part."""
        return self.model_copy(update={"window": None})

    def looks_back(self, source_window: int | None) -> int | None:
        return self.window or source_window

    def linears(self, arch: ArchSpec) -> dict[str, tuple[int, int]]:
        return attention_linears(arch)

    def vectors(self, arch: ArchSpec) -> dict[str, Shape]:
        return attention_vectors(arch)

    def carried(self, arch: ArchSpec) -> Mapping[str, Carried]:
        names = (*self.vectors(arch), *(f"{name}.weight" for name in self.linears(arch)))
        return {name: Carried(f"mixer.{name}") for name in names}

    def flops_per_context_token(self, arch: ArchSpec) -> int:
        # One multiply-add for the score and one for the weighted value, for each head dimension.
        return 4 * arch.num_attention_heads * arch.head_dim

    def cache_elements_per_token(self, arch: ArchSpec) -> int:
        return key_value_elements(arch)


def attention_linears(arch: ArchSpec) -> dict[str, tuple[int, int]]:
    """Returns name and `(out, in)` of each projection of the source's attention."""
    queries = arch.num_attention_heads * arch.head_dim
    keys = arch.num_key_value_heads * arch.head_dim
    return {
        "q_proj": (queries, arch.hidden_size),
        "k_proj": (keys, arch.hidden_size),
        "v_proj": (keys, arch.hidden_size),
        "o_proj": (arch.hidden_size, queries),
    }


def attention_vectors(arch: ArchSpec) -> dict[str, Shape]:
    """Returns name and shape of each norm and bias of the source's attention."""
    shapes = attention_linears(arch)
    found = outer_norms(arch) | attention_biases(arch, shapes)
    if arch.qk_norm != "none":
        whole = arch.qk_norm == "full"
        found["q_norm.weight"] = (shapes["q_proj"][0] if whole else arch.head_dim,)
        found["k_norm.weight"] = (shapes["k_proj"][0] if whole else arch.head_dim,)
    return found


def attention_biases(arch: ArchSpec, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Shape]:
    """Returns name and shape of each bias of the source's attention, for projections of the given shapes."""
    biased = (("q_proj", "k_proj", "v_proj") if arch.qkv_bias else ()) + (("o_proj",) if arch.o_bias else ())
    return {f"{name}.bias": (shapes[name][0],) for name in biased}


def key_value_elements(arch: ArchSpec) -> int:
    """Counts the numbers in the key and the value of one token, over all heads."""
    return 2 * arch.num_key_value_heads * arch.head_dim
