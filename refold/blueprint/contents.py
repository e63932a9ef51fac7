"""The linears and vectors that stored parts hold and depths run, without those that no depth needs."""

from collections.abc import Mapping

from refold.blueprint.schema import Blueprint, Pool
from refold.mixers.mlp import MLP
from refold.mixers.spec import PartSpec, Shape

Linears = dict[str, tuple[int, int]]
"""Linear name to `(out, in)`."""


def part_linears(blueprint: Blueprint, pool: Pool, part: int) -> Linears:
    """Returns the linears of a stored part that at least one of its depths runs."""
    spec = part_spec(blueprint, pool, part)
    unused = unused_names(blueprint, pool, part)
    return {name: shape for name, shape in spec.linears(blueprint.arch).items() if name not in unused}


def part_vectors(blueprint: Blueprint, pool: Pool, part: int) -> dict[str, Shape]:
    """Returns the norms and biases of a part that at least one depth uses, whether the part or a depth stores them."""
    spec = part_spec(blueprint, pool, part)
    return _without(spec.vectors(blueprint.arch), unused_names(blueprint, pool, part))


def depth_linears(blueprint: Blueprint, index: int) -> Linears:
    """Returns every linear that a depth runs. No linear of a mixer has the name of a linear of the MLP."""
    depth = blueprint.depths[index]
    found: Linears = {}
    if depth.mixer is not None:
        spec = part_spec(blueprint, "mixer", depth.mixer)
        idle = idle_names(blueprint, index)
        found |= {name: shape for name, shape in spec.linears(blueprint.arch).items() if name not in idle}
    if depth.mlp is not None:
        found |= MLP.linears(blueprint.arch)
    return found


def linear_pools(blueprint: Blueprint, index: int) -> dict[str, Pool]:
    """Returns the pool of each linear that a depth runs, in the order of execution."""
    mixer = blueprint.depths[index].mixer
    of_mixer = {} if mixer is None else part_linears(blueprint, "mixer", mixer)
    return {linear: "mixer" if linear in of_mixer else "mlp" for linear in depth_linears(blueprint, index)}


def depth_factors(blueprint: Blueprint, index: int) -> dict[str, int]:
    """Returns the rank of each linear that a depth runs as two factors, whether the part or the depth stores them."""
    depth = blueprint.depths[index]
    mixer = {} if depth.mixer is None else blueprint.mixers[depth.mixer].factors
    mlp = {} if depth.mlp is None else blueprint.mlps[depth.mlp].factors
    return {**mixer, **mlp, **depth_coefficients(blueprint, index)}


def depth_coefficients(blueprint: Blueprint, index: int) -> dict[str, int]:
    """Returns the rank of each linear of a depth whose part stores only a basis, so that the depth has coefficients."""
    depth = blueprint.depths[index]
    mixer = {} if depth.mixer is None else blueprint.mixers[depth.mixer].bases
    bases = {**mixer, **({} if depth.mlp is None else blueprint.mlps[depth.mlp].bases)}
    run = depth_linears(blueprint, index) if bases else {}
    return {name: rank for name, rank in bases.items() if name in run}


def depth_vectors(blueprint: Blueprint, index: int, pool: Pool) -> dict[str, Shape]:
    """Returns the norms and biases that a depth uses in one pool: those of its mixer, or of its MLP."""
    depth = blueprint.depths[index]
    part = getattr(depth, pool)
    if part is None:
        return {}
    spec = part_spec(blueprint, pool, part)
    return _without(spec.vectors(blueprint.arch), idle_names(blueprint, index) if pool == "mixer" else ())


def unused_names(blueprint: Blueprint, pool: Pool, part: int) -> frozenset[str]:
    """Returns the linears and norms of a stored part that no depth runs, and which are therefore not stored."""
    if pool == "mlp":
        return frozenset()
    idle = [idle_names(blueprint, user) for user in blueprint.users("mixer", part)]
    return frozenset.intersection(*idle)


def users_of(blueprint: Blueprint, pool: Pool, part: int, name: str) -> tuple[int, ...]:
    """Returns the depths that use one linear, norm or bias of a stored part, in the order of execution.

    Args:
        blueprint: The stack.
        pool: The pool of the part.
        part: The index of the part.
        name: The tensor's name in the part, such as `k_proj.weight`.
    """
    owner = name.split(".", 1)[0]
    users = blueprint.users(pool, part)
    return users if pool == "mlp" else tuple(user for user in users if owner not in idle_names(blueprint, user))


def part_spec(blueprint: Blueprint, pool: Pool, part: int) -> PartSpec:
    """Returns the typed object of a stored part: the mixer or the MLP."""
    return MLP if pool == "mlp" else blueprint.mixers[part].mixer


def idle_names(blueprint: Blueprint, index: int) -> frozenset[str]:
    """Returns the linears and norms of its mixer that a depth does not run, because it computes no keys and values."""
    mixer = blueprint.depths[index].mixer
    if mixer is None or blueprint.made_heads(index):
        return frozenset()
    return blueprint.mixers[mixer].mixer.key_value_names


def _without(vectors: Mapping[str, Shape], owners: frozenset[str] | tuple[()]) -> dict[str, Shape]:
    return {name: shape for name, shape in vectors.items() if name.split(".", 1)[0] not in owners}
