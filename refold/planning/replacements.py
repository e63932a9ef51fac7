"""The runs of dropped parts that linear maps replace, and the part before each run that takes its map."""

from collections.abc import Iterator, Mapping, Sequence

from refold.blueprint.origins import OUTPUT_PROJECTIONS, Replacement
from refold.blueprint.schema import POOLS, Blueprint, Pool
from refold.errors import RecipeError
from refold.planning.drops import NAMES
from refold.recipe.drop import Drop, Dropping

PartPlace = tuple[int, Pool]
"""A source layer and a pool."""


def choose_replacements(
    drop: Drop, blueprint: Blueprint, blocks: frozenset[int], parts: Mapping[Pool, frozenset[int]]
) -> tuple[Replacement, ...]:
    """Returns the replacement of each run of dropped parts in which any part is dropped with a replacement.

    A run holds the dropped parts between two parts that are kept. In an architecture whose attention and MLP read the
    same input, a kept part of a layer stands before the dropped one.

    Args:
        drop: The recipe's `drop`.
        blueprint: The target.
        blocks: Layers that are dropped as a whole.
        parts: For each pool the further layers whose part is dropped.

    Raises:
        RecipeError: Nothing stands before a run, or the part there cannot take a map.
    """
    wanted: dict[PartPlace, str] = dict(_wanted(drop, blocks, parts))
    found: list[Replacement] = []
    before: PartPlace | None = None
    run: list[PartPlace] = []
    places = list(_in_order(blueprint))
    for place, is_kept in (*places, (None, True)):
        if not is_kept:
            assert place is not None
            run.append(place)
            continue
        where = next((wanted[place] for place in run if place in wanted), None)
        if where is not None:
            found.append(_replace(blueprint, where, before, tuple(run)))
        before, run = place, []
    return tuple(found)


def describe_replacements(replacements: tuple[Replacement, ...]) -> tuple[str, ...]:
    """Returns a note for each linear map."""
    return tuple(f"drop: a linear map in place of {each.describe()}" for each in replacements)


def _wanted(
    drop: Drop, blocks: frozenset[int], parts: Mapping[Pool, frozenset[int]]
) -> Iterator[tuple[PartPlace, str]]:
    """Yields each part that is dropped with a replacement, and the section of the recipe that says so."""
    if drop.block is not None:
        for layer in filter(drop.block.replaces, blocks):
            for pool in POOLS:
                yield (layer, pool), "drop.block"
    for pool, name in NAMES.items():
        given: Dropping | None = getattr(drop, name)
        section = f"drop.{name}"
        if drop.sublayers is not None:
            given, section = drop.sublayers, "drop.sublayers"
        if given is not None:
            for layer in filter(given.replaces, parts[pool]):
                yield (layer, pool), section


def _in_order(blueprint: Blueprint) -> Iterator[tuple[PartPlace, bool]]:
    """Yields each part and whether it is kept, in the order of the stack."""
    for depth in blueprint.depths:
        kept: dict[Pool, bool] = {pool: getattr(depth, pool) is not None for pool in POOLS}
        pools: Sequence[Pool] = POOLS
        if blueprint.arch.residual == "parallel":
            pools = sorted(POOLS, key=lambda pool: not kept[pool])
        for pool in pools:
            yield (depth.source, pool), kept[pool]


def _replace(blueprint: Blueprint, where: str, before: PartPlace | None, gone: tuple[PartPlace, ...]) -> Replacement:
    lost = Replacement.name(gone)
    if before is None:
        raise RecipeError(
            f"{where}.replace: attention or an MLP before the dropped parts is required (got {lost} at the beginning "
            f"of the stack); keep the first of them, or set replace to none"
        )
    layer, pool = before
    reason = _why_not(blueprint, layer, pool)
    if reason:
        raise RecipeError(
            f"{where}.replace: before {lost}, attention or an MLP of the source that one depth alone uses is required "
            f"(got {Replacement.name((before,))}: {reason}); drop other parts, or set replace to none"
        )
    into = "output_norm" if blueprint.arch.output_norms else OUTPUT_PROJECTIONS[pool]
    return Replacement(pool=pool, layer=layer, gone=gone, into=into)


def _why_not(blueprint: Blueprint, layer: int, pool: Pool) -> str:
    """Returns the reason why a part cannot take a map; empty: it can."""
    part = next(getattr(depth, pool) for depth in blueprint.depths if depth.source == layer)
    users = [blueprint.depths[user].source for user in blueprint.users(pool, part)]
    if len(users) > 1:
        return f"tied in layers {users}"
    if pool == "mixer" and not blueprint.mixers[part].mixer.is_native:
        return f"it becomes {blueprint.mixers[part].mixer.type}"
    makes = [index for index, each in enumerate(blueprint.pool(pool)) if layer in each.sources]
    return "" if makes == [part] and blueprint.pool(pool)[part].sources == (layer,) else "its weights are others'"
