"""Queries, keys and values of mixers that have them: head counts, sizes, and what of attention fits into them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refold.errors import RecipeError
from refold.families.arch import ArchSpec
from refold.fields import Count
from refold.mixers import attention
from refold.mixers.placement import MixerSwap
from refold.mixers.spec import Carried, Fill, Shape, outer_norms

FILLS: Mapping[str, Fill] = {
    "decay.a_log": Fill("log_uniform", 1.0, 16.0),
    "decay.dt_bias": Fill("softplus_inverse", 0.001, 0.1),
    "skip.d": Fill("constant", 1.0),
    "conv.weight": Fill("last_tap"),
    "conv.bias": Fill("constant", 0.0),
    "heads.scale": Fill("constant", 1.0),
}
"""What vectors start from that attention does not have."""


class HeadedSwap(MixerSwap):
    """Replaces attention by a mixer with queries, keys and values in heads."""

    heads: Count | None = None
    """Heads of the state; left out: as many as the source has query heads."""
    q_heads: Count | None = None
    """Heads of the queries, each serving a group of the state's; left out: one each."""
    k_heads: Count | None = None
    """Heads of the keys; left out: one each, so that grouped key-value heads of a source are repeated."""
    v_heads: Count | None = None
    """Heads of the values; left out: one each."""
    key_dim: Count | None = None
    """Size of a query and key head; left out: all heads together as wide as the source's."""
    value_dim: Count | None = None
    """Size of a value head; left out: all heads together as wide as the source's."""


@dataclass(frozen=True)
class Heads:
    """How queries, keys and values are divided."""

    heads: int
    q_heads: int
    k_heads: int
    v_heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Heads":
        """Reads them from a part's resolved options."""
        return cls(**{name: options[name] for name in cls.__dataclass_fields__})

    @property
    def value_width(self) -> int:
        """Numbers in what all heads give together."""
        return self.heads * self.value_dim

    @property
    def read_width(self) -> int:
        """Numbers in queries, keys and values together, as they are projected."""
        return (self.q_heads + self.k_heads) * self.key_dim + self.v_heads * self.value_dim

    @property
    def state_size(self) -> int:
        """Numbers in the state of one sequence."""
        return self.heads * self.key_dim * self.value_dim


def resolve_heads(arch: ArchSpec, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the options with head counts and sizes filled in.

    Args:
        arch: The source.
        options: As the recipe gives them.
        where: The recipe's key, for messages.

    Raises:
        RecipeError: A count does not divide the heads, a size cannot be told, or heads are too small to be turned.
    """
    width = arch.num_attention_heads * arch.head_dim
    heads = options["heads"] or arch.num_attention_heads
    found = dict(options, heads=heads)
    for name in ("q_heads", "k_heads", "v_heads"):
        found[name] = options[name] or heads
        if heads % found[name]:
            raise RecipeError(f"{where}.{name}: must divide the {heads} heads of the state (got {found[name]})")
    for name in ("key_dim", "value_dim"):
        if options[name] is None and width % heads:
            raise RecipeError(f"{where}.{name}: required where {heads} heads do not divide the source's width {width}")
        found[name] = options[name] or width // heads
    turned = max((layer.rope.rotary_dim for layer in arch.layers if layer.rope), default=0)
    if options.get("rotary") and found["key_dim"] < turned:
        raise RecipeError(
            f"{where}.rotary: must be false where key heads are smaller than what the source's rotary embedding turns "
            f"(got heads of {found['key_dim']}, of which {turned} would be turned)"
        )
    return found


def head_linears(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """`q_proj`, `k_proj`, `v_proj` and `o_proj`."""
    heads, hidden = Heads.of(options), arch.hidden_size
    return {
        "q_proj": (heads.q_heads * heads.key_dim, hidden),
        "k_proj": (heads.k_heads * heads.key_dim, hidden),
        "v_proj": (heads.v_heads * heads.value_dim, hidden),
        "o_proj": (hidden, heads.value_width),
    }


def head_vectors(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, Shape]:
    """Norms around the mixer, and the biases that the source's attention has."""
    return outer_norms(arch) | attention.biases(arch, head_linears(arch, options))


def head_fills(vectors: Mapping[str, Shape]) -> dict[str, Fill]:
    """The fresh values of those of a mixer's vectors that attention does not have."""
    return {name: fill for name, fill in FILLS.items() if name in vectors}


def carried_norms(arch: ArchSpec) -> dict[str, Carried]:
    """The norms around a mixer, which every mixer takes over."""
    return {name: Carried(f"mixer.{name}") for name in outer_norms(arch)}


def carried_heads(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, Carried]:
    """What fits of the source's projections, and why the rest does not."""
    heads = Heads.of(options)
    query = arch.num_attention_heads, arch.head_dim
    grouped = arch.num_key_value_heads, arch.head_dim
    found = {
        "q_proj": _carry_rows("q_proj", query, (heads.q_heads, heads.key_dim)),
        "k_proj": _carry_rows("k_proj", grouped, (heads.k_heads, heads.key_dim)),
        "v_proj": _carry_rows("v_proj", grouped, (heads.v_heads, heads.value_dim)),
        "o_proj": carry_output(arch, heads.value_width),
    }
    vectors = head_vectors(arch, options)
    carried = carried_norms(arch)
    for name, each in found.items():
        carried[f"{name}.weight"] = each
        if f"{name}.bias" in vectors:
            carried[f"{name}.bias"] = Carried(f"mixer.{name}.bias", name, each.repeat, each.misfit)
    return carried


def carry_output(arch: ArchSpec, width: int) -> Carried:
    """The output projection, which fits wherever all heads together are as wide as the source's."""
    source = arch.num_attention_heads * arch.head_dim
    misfit = "" if width == source else f"the source's is {source} wide, this mixer's {width}"
    return Carried("mixer.o_proj.weight", "o_proj", misfit=misfit)


def _carry_rows(name: str, source: tuple[int, int], target: tuple[int, int]) -> Carried:
    canonical = f"mixer.{name}.weight"
    if target[1] != source[1] or target[0] % source[0]:
        misfit = f"the source has {source[0]} heads of {source[1]}, this mixer {target[0]} of {target[1]}"
        return Carried(canonical, name, misfit=misfit)
    return Carried(canonical, name, repeat=target[0] // source[0])
