"""Gated linear attention: every channel of the keys fades at a rate of its own that depends on the token."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from refold.errors import RecipeError
from refold.families.arch import ArchSpec
from refold.fields import Count, Real
from refold.mixers.heads import HeadedSwap, Heads, carried_heads, head_fills, head_linears, head_vectors, resolve_heads
from refold.mixers.spec import PartSpec, Shape


class Gla(HeadedSwap):
    """Replaces attention by gated linear attention (arXiv 2312.06635)."""

    type: Literal["gla"] = "gla"
    decay_from: Literal["projection", "keys"] = "projection"
    """Where decays come from: a low-rank projection of the input, or each head's keys themselves, which needs no new
    weights (Liger, arXiv 2503.01496)."""
    decay_rank: Count = 16
    """Rank of that projection."""
    decay_divisor: Annotated[Real, Field(gt=0)] = 16.0
    """What the logarithm of the sigmoid is divided by; more forgets less."""
    rotary: bool = False
    """Whether queries and keys are turned by the source's rotary embedding."""
    activation: Literal["none", "softmax"] = "none"
    """On queries and keys; Liger takes the softmax over a head's channels."""
    norm: Literal["head", "none"] = "head"
    """Root-mean-square norm of each head's output, with weights that all heads share."""
    gate: Literal["silu", "none"] = "silu"
    """Gate on the normed output, from a projection of its own."""


def resolve(arch: ArchSpec, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the options with head counts and sizes filled in.

    Raises:
        RecipeError: As `resolve_heads`, or keys would be turned before decays are taken from them.
    """
    if options["decay_from"] == "keys" and options["rotary"]:
        raise RecipeError(f"{where}.rotary: must be false where decays come from the keys, which it turns (got true)")
    return resolve_heads(arch, options, where)


def linears(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    heads = Heads.of(options)
    found = head_linears(arch, options)
    if options["decay_from"] == "projection":
        found["decay_down_proj"] = (options["decay_rank"], arch.hidden_size)
        found["decay_up_proj"] = (heads.heads * heads.key_dim, options["decay_rank"])
    if options["gate"] != "none":
        found["g_proj"] = (heads.value_width, arch.hidden_size)
    return found


def vectors(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, Shape]:
    heads = Heads.of(options)
    found = head_vectors(arch, options)
    if options["decay_from"] == "projection":
        found["decay_up_proj.bias"] = (heads.heads * heads.key_dim,)
    if options["norm"] == "head":
        found["heads.scale"] = (heads.value_dim,)
    return found


SPEC = PartSpec(
    name="gla",
    url="https://arxiv.org/abs/2312.06635",
    linears=linears,
    vectors=vectors,
    flops_per_token=lambda arch, options: 5 * Heads.of(options).state_size,
    state_elements=lambda arch, options: Heads.of(options).state_size,
    fills=lambda arch, options: head_fills(vectors(arch, options)),
    carried=carried_heads,
    rotary=lambda options: bool(options["rotary"]),
    resolve=resolve,
    is_recurrent=True,
)
