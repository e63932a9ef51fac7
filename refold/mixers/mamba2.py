"""Mamba-2: a state-space model with one decay for each head and token (state space duality)."""

from collections.abc import Mapping
from typing import Any, Literal

from refold.families.arch import ArchSpec
from refold.fields import LayerIndex
from refold.mixers.heads import HeadedSwap, Heads, carried_heads, head_fills, head_linears, head_vectors, resolve_heads
from refold.mixers.spec import PartSpec, Shape


class Mamba2(HeadedSwap):
    """Replaces attention by Mamba-2 (arXiv 2405.21060).

    Queries, keys and values are what that paper calls C, B and x, as Mamba in the Llama (arXiv 2408.15237) maps them.
    """

    type: Literal["mamba2"] = "mamba2"
    conv: LayerIndex = 4
    """Width of the short convolution on queries, keys and values; 0: none."""
    conv_activation: Literal["silu", "none"] = "silu"
    """After the convolution."""
    norm: Literal["group", "none"] = "group"
    """Root-mean-square norm of the gated output, over all heads that a query head serves."""
    gate: Literal["silu", "none"] = "silu"
    """Gate on the output, from a projection of its own (z in the paper)."""


def linears(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    heads = Heads.of(options)
    found = head_linears(arch, options) | {"dt_proj": (heads.heads, arch.hidden_size)}
    if options["gate"] != "none":
        found["g_proj"] = (heads.value_width, arch.hidden_size)
    return found


def vectors(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, Shape]:
    heads = Heads.of(options)
    found = head_vectors(arch, options)
    found |= {"decay.a_log": (heads.heads,), "decay.dt_bias": (heads.heads,), "skip.d": (heads.heads,)}
    if options["conv"]:
        found |= {"conv.weight": (heads.read_width, options["conv"]), "conv.bias": (heads.read_width,)}
    if options["norm"] == "group":
        found["heads.scale"] = (heads.value_width,)
    return found


def recurrence_flops(arch: ArchSpec, options: Mapping[str, Any]) -> int:
    heads = Heads.of(options)
    return 5 * heads.state_size + 2 * options["conv"] * heads.read_width


SPEC = PartSpec(
    name="mamba2",
    url="https://arxiv.org/abs/2405.21060",
    linears=linears,
    vectors=vectors,
    flops_per_token=recurrence_flops,
    state_elements=lambda arch, options: Heads.of(options).state_size,
    kept_elements=lambda arch, options: max(options["conv"] - 1, 0) * Heads.of(options).read_width,
    fills=lambda arch, options: head_fills(vectors(arch, options)),
    carried=carried_heads,
    rotary=lambda options: False,
    resolve=resolve_heads,
    is_recurrent=True,
)
