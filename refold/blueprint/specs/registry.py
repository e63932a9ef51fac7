"""All mixers, by the name a blueprint uses for them."""

from collections.abc import Mapping

from refold.blueprint.schema import Blueprint, Depth
from refold.blueprint.specs import (
    attention,
    gated_deltanet,
    gla,
    linear_attention,
    mamba,
    mamba2,
    mlp,
    retention,
)
from refold.blueprint.specs.part import PartSpec
from refold.errors import RecipeError
from refold.suggest import must_be_one_of

MIXERS: Mapping[str, PartSpec] = {
    spec.name: spec
    for spec in (
        attention.SPEC,
        retention.SPEC,
        mamba.SPEC,
        mamba2.SPEC,
        gla.SPEC,
        gated_deltanet.SPEC,
        linear_attention.SPEC,
    )
}
MLP = mlp.SPEC


def find_mixer(name: str) -> PartSpec:
    """Returns a mixer's spec.

    Raises:
        RecipeError: No mixer of that name.
    """
    if name not in MIXERS:
        raise RecipeError(f"mixers: type: {must_be_one_of(name, MIXERS)}")
    return MIXERS[name]


def depth_linears(blueprint: Blueprint, depth: Depth) -> dict[str, tuple[int, int]]:
    """Every linear a depth runs: name to `(out, in)`. Names of mixer and MLP linears never meet."""
    found: dict[str, tuple[int, int]] = {}
    if depth.mixer is not None:
        part = blueprint.mixers[depth.mixer]
        found |= find_mixer(part.type).linears(blueprint.arch, part.options)
    if depth.mlp is not None:
        found |= MLP.linears(blueprint.arch, {})
    return found


def depth_factors(blueprint: Blueprint, depth: Depth) -> dict[str, int]:
    """Rank of each linear a depth runs that is stored as two factors."""
    mixer = {} if depth.mixer is None else blueprint.mixers[depth.mixer].factors
    return {**mixer, **({} if depth.mlp is None else blueprint.mlps[depth.mlp].factors)}
