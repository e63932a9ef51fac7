"""Factors of stored linears: their even ranks under a parameter budget, and the parameters they take."""

from collections.abc import Collection, Iterator, Mapping

from refold.blueprint.schema import POOLS, Blueprint, Pool, depth_linears, part_linears, users_of
from refold.errors import RecipeError
from refold.planning.allocation import with_ranks
from refold.planning.layer_lists import first_layer, require_layer_lists
from refold.recipe.low_rank import Factor
from refold.recipe.recipe import Recipe

StoredLinears = tuple[Pool, int, str, tuple[int, int]]
"""Pool, part, linear and its `(out, in)`."""


def stored_linears(blueprint: Blueprint) -> Iterator[StoredLinears]:
    """Yields every stored linear once, with the shape of the whole matrix."""
    for pool in POOLS:
        for index in range(len(blueprint.pool(pool))):
            for name, shape in part_linears(blueprint, pool, index).items():
                yield pool, index, name, shape


def lora_parameters(blueprint: Blueprint, skipped: Collection[tuple[Pool, int, str]] = ()) -> int:
    """Counts the parameters of all LoRAs, except those of the `skipped` stored linears (pool, part, name)."""
    return sum(
        rank * sum(depth_linears(blueprint, index)[name])
        for index, depth in enumerate(blueprint.depths)
        for name, rank in depth.ranks.items()
        if ("mixer", depth.mixer, name) not in skipped and ("mlp", depth.mlp, name) not in skipped
    )


def stored_parameters(blueprint: Blueprint, stored: StoredLinears) -> int:
    """Counts the parameters of a linear as stored: whole, as two factors, or as a basis with its coefficients."""
    pool, index, linear, (rows, columns) = stored
    part = blueprint.pool(pool)[index]
    if linear in part.bases:
        return part.bases[linear] * (columns + rows * _num_users(blueprint, pool, index, linear))
    rank = part.factors.get(linear)
    return rows * columns if rank is None else rank * (rows + columns)


def stored_share(blueprint: Blueprint, source: Blueprint) -> float:
    """Returns the share of the source's linear weights that a target stores, LoRAs included."""
    whole = sum(rows * columns for *_, (rows, columns) in stored_linears(source))
    stored = sum(stored_parameters(blueprint, each) for each in stored_linears(blueprint))
    return (stored + lora_parameters(blueprint)) / whole


def _num_users(blueprint: Blueprint, pool: Pool, part: int, linear: str) -> int:
    return len(users_of(blueprint, pool, part, f"{linear}.weight"))


def linear_budget(source: Blueprint, share: float) -> int:
    """Returns the parameter budget of linears and LoRAs: a share of the source's linear weights."""
    return int(share * sum(rows * columns for *_, (rows, columns) in stored_linears(source)))


def factorise_evenly(blueprint: Blueprint, source: Blueprint, factor: Factor) -> tuple[Blueprint, str]:
    """Stores every linear as two factors, or as a basis and coefficients, with the same share of its parameters.

    A basis replaces the weights of all depths that run the linear, so its share is that of all these weights together.

    Args:
        blueprint: The stack with its LoRAs, which the budget includes.
        source: The source as a blueprint.
        factor: The recipe's `factor`.

    Returns:
        The blueprint, and a note about the share.

    Raises:
        RecipeError: The budget does not hold rank 1 for every linear besides the LoRAs; or no linear is tied.
    """
    stored = list(stored_linears(blueprint))
    # Number of source weights that each stored linear replaces.
    counts = [1] * len(stored)
    if factor.share == "basis":
        counts = [_num_users(blueprint, pool, part, name) for pool, part, name, _ in stored]
        if max(counts, default=1) == 1:
            raise RecipeError(
                "factor.share: tied layers are required for a basis (no linear is used twice); add `fold: {loops: 2}`, "
                "or remove factor.share"
            )
    assert factor.parameters is not None
    room = linear_budget(source, factor.parameters) - lora_parameters(blueprint)
    whole = sum(count * rows * columns for count, (*_, (rows, columns)) in zip(counts, stored, strict=True))
    share = room / max(whole, 1)
    factors: dict[tuple[Pool, int], dict[str, int | None]] = {}
    bases: dict[tuple[Pool, int], dict[str, int]] = {}
    for count, (pool, part, name, (rows, columns)) in zip(counts, stored, strict=True):
        rank = int(share * count * rows * columns / (columns + count * rows))
        if count > 1:
            bases.setdefault((pool, part), {})[name] = min(rank, columns, count * rows)
        elif share < 1:
            factors.setdefault((pool, part), {})[name] = rank
    if share >= 1 and not bases:
        return blueprint, f"factor.parameters: {factor.parameters:g} is enough to store every linear whole"
    if min(rank or 0 for ranks in (*factors.values(), *bases.values()) for rank in ranks.values()) < 1:
        raise RecipeError(
            f"factor.parameters: a share that leaves every stored linear a rank of 1 is required (got "
            f"{factor.parameters:g}, LoRAs included); raise it, or lower relax.rank"
        )
    kept = f"factor.parameters: {factor.parameters:g} keeps {min(share, 1):.1%} of every "
    note = f"{kept}weight: tied linears share a basis" if bases else f"{kept}stored linear as two factors"
    return with_ranks(blueprint, {}, factors, bases), note


def factorise_listed(blueprint: Blueprint, factor: Factor) -> tuple[Blueprint, str]:
    """Stores linears as two factors of the listed ranks.

    Args:
        blueprint: The stack.
        factor: The recipe's `factor`, with `ranks`.

    Returns:
        The blueprint, and a note about the ranks.

    Raises:
        RecipeError: A list is not one of a linear, or has another length than the source has layers.
    """
    assert factor.ranks is not None
    stored, factors = list(stored_linears(blueprint)), dict[tuple[Pool, int], dict[str, int | None]]()
    require_layer_lists("factor.ranks", factor.ranks, blueprint)
    for pool, part, name, shape in stored:
        entry = factor.ranks[name][first_layer(blueprint, pool, part)] if name in factor.ranks else "full"
        if entry != "full":
            factors.setdefault((pool, part), {})[name] = min(entry, *shape)
    count = sum(len(each) for each in factors.values())
    return with_ranks(blueprint, {}, factors), f"factor.ranks: {count} of {len(stored)} stored linears as two factors"


def with_multiples(blueprint: Blueprint, recipe: Recipe) -> Blueprint:
    """Returns the blueprint with ranks in the multiples of a recipe; ranks below a multiple, and full ranks, stay."""
    factors = 1 if recipe.factor is None else recipe.factor.multiple
    loras = 1 if recipe.lora is None else recipe.lora.multiple
    if factors == loras == 1:
        return blueprint

    def lower(ranks: Mapping[str, int], multiple: int, full: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        return {
            name: rank if rank < multiple or rank == min(full[name]) else rank // multiple * multiple
            for name, rank in ranks.items()
        }

    made: dict[str, tuple[object, ...]] = {}
    for pool in POOLS:
        parts = []
        for index, part in enumerate(blueprint.pool(pool)):
            shapes = part_linears(blueprint, pool, index)
            ranks = {name: lower(getattr(part, name), factors, shapes) for name in ("factors", "bases")}
            parts.append(part.model_copy(update=ranks))
        made[f"{pool}s"] = tuple(parts)
    made["depths"] = tuple(
        depth.model_copy(update={"ranks": lower(depth.ranks, loras, depth_linears(blueprint, index))})
        for index, depth in enumerate(blueprint.depths)
    )
    return blueprint.model_copy(update=made)
