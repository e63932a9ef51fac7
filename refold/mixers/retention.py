"""Retention: a state that fades at a fixed rate for each head; lightning attention is a setting of it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from refold.families.arch import ArchSpec
from refold.fields import Real
from refold.mixers.heads import HeadedSwap, Heads, carried_heads, head_fills, head_linears, head_vectors, resolve_heads
from refold.mixers.spec import PartSpec, Shape


class Retention(HeadedSwap):
    """Replaces attention by retention (arXiv 2307.08621)."""

    type: Literal["retention"] = "retention"
    decay: Literal["retnet", "slopes"] = "retnet"
    """How fast head h of H forgets: `retnet`: 1 - 2^(-5-h) is kept for each token; `slopes`: exp(-2^(-8(h+1)/H)), as in
    lightning attention."""
    decay_scale: Annotated[Real, Field(gt=0)] = 1.0
    """Factor on the decays' logarithms; lightning attention lets it fall from layer to layer."""
    rotary: bool = True
    """Whether queries and keys are turned by the source's rotary embedding."""
    activation: Literal["none", "silu"] = "none"
    """On queries, keys and values; lightning attention has `silu`."""
    norm: Literal["head", "full", "none"] = "head"
    """Root-mean-square norm of the output: of each head without weights (the paper's group norm), or of all heads at
    once with weights (lightning attention)."""
    gate: Literal["silu", "sigmoid", "none"] = "silu"
    """Gate on the normed output, from a projection of its own."""


def linears(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    gate = {} if options["gate"] == "none" else {"g_proj": (Heads.of(options).value_width, arch.hidden_size)}
    return head_linears(arch, options) | gate


def vectors(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, Shape]:
    scale = {"heads.scale": (Heads.of(options).value_width,)} if options["norm"] == "full" else {}
    return head_vectors(arch, options) | scale


def recurrence_flops(arch: ArchSpec, options: Mapping[str, Any]) -> int:
    # One multiply-add each to fade, to write and to read a number of the state.
    return 5 * Heads.of(options).state_size


SPEC = PartSpec(
    name="retention",
    url="https://arxiv.org/abs/2307.08621",
    linears=linears,
    vectors=vectors,
    flops_per_token=recurrence_flops,
    state_elements=lambda arch, options: Heads.of(options).state_size,
    fills=lambda arch, options: head_fills(vectors(arch, options)),
    carried=carried_heads,
    rotary=lambda options: bool(options["rotary"]),
    resolve=resolve_heads,
    is_recurrent=True,
)
