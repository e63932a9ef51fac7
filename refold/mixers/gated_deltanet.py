"""Gated delta rule: the state forgets what a key held before it writes the new value there."""

from collections.abc import Mapping
from typing import Any, Literal

from refold.families.arch import ArchSpec
from refold.fields import LayerIndex
from refold.mixers.heads import HeadedSwap, Heads, carried_heads, head_fills, head_linears, head_vectors, resolve_heads
from refold.mixers.spec import PartSpec, Shape


class GatedDeltanet(HeadedSwap):
    """Replaces attention by Gated DeltaNet (arXiv 2412.06464)."""

    type: Literal["gated_deltanet"] = "gated_deltanet"
    decay: bool = True
    """Whether the state also fades, by token and head; without it this is DeltaNet (arXiv 2406.06484)."""
    conv: LayerIndex = 4
    """Width of the short convolution on queries, keys and values; 0: none."""
    conv_activation: Literal["silu", "none"] = "silu"
    """After the convolution."""
    rotary: bool = False
    """Whether queries and keys are turned by the source's rotary embedding."""
    norm: Literal["head", "none"] = "head"
    """Root-mean-square norm of each head's output, with weights that all heads share."""
    gate: Literal["silu", "none"] = "silu"
    """Gate on the normed output, from a projection of its own."""


def linears(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    heads = Heads.of(options)
    found = head_linears(arch, options) | {"beta_proj": (heads.heads, arch.hidden_size)}
    if options["decay"]:
        found["decay_proj"] = (heads.heads, arch.hidden_size)
    if options["gate"] != "none":
        found["g_proj"] = (heads.value_width, arch.hidden_size)
    return found


def vectors(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, Shape]:
    heads = Heads.of(options)
    found = head_vectors(arch, options)
    if options["decay"]:
        found |= {"decay.a_log": (heads.heads,), "decay.dt_bias": (heads.heads,)}
    if options["conv"]:
        found["conv.weight"] = (heads.read_width, options["conv"])
    if options["norm"] == "head":
        found["heads.scale"] = (heads.value_dim,)
    return found


def recurrence_flops(arch: ArchSpec, options: Mapping[str, Any]) -> int:
    heads = Heads.of(options)
    # To fade, to read under the key, to write and to read under the query; and the convolution.
    return 7 * heads.state_size + 2 * options["conv"] * heads.read_width


SPEC = PartSpec(
    name="gated_deltanet",
    url="https://arxiv.org/abs/2412.06464",
    linears=linears,
    vectors=vectors,
    flops_per_token=recurrence_flops,
    state_elements=lambda arch, options: Heads.of(options).state_size,
    kept_elements=lambda arch, options: max(options["conv"] - 1, 0) * Heads.of(options).read_width,
    fills=lambda arch, options: head_fills(vectors(arch, options)),
    carried=carried_heads,
    rotary=lambda options: bool(options["rotary"]),
    resolve=resolve_heads,
    is_recurrent=True,
)
