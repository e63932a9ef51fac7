"""Which stored linears are kept as two factors, and at which rank, where a budget is split evenly."""

from collections.abc import Collection, Iterator

from refold.blueprint.allocation import with_ranks
from refold.blueprint.contents import depth_linears, part_linears
from refold.blueprint.recipe import Factor
from refold.blueprint.schema import POOLS, Blueprint, Pool
from refold.errors import RecipeError

Stored = tuple[Pool, int, str, tuple[int, int]]
"""Pool, part, linear and its `(out, in)`."""


def stored_linears(blueprint: Blueprint) -> Iterator[Stored]:
    """Yields every stored linear once, as it is before any is factorised."""
    for pool in POOLS:
        for index in range(len(blueprint.pool(pool))):
            for name, shape in part_linears(blueprint, pool, index).items():
                yield pool, index, name, shape


def lora_parameters(blueprint: Blueprint, skipped: Collection[tuple[Pool, int, str]] = ()) -> int:
    """Parameters of all LoRAs, without those of some stored linears (pool, part, name)."""
    return sum(
        rank * sum(depth_linears(blueprint, index)[name])
        for index, depth in enumerate(blueprint.depths)
        for name, rank in depth.ranks.items()
        if ("mixer", depth.mixer, name) not in skipped and ("mlp", depth.mlp, name) not in skipped
    )


def stored_share(blueprint: Blueprint, source: Blueprint) -> float:
    """Returns the share of the source's linear weights that a target stores, LoRAs included."""
    whole = sum(rows * columns for *_, (rows, columns) in stored_linears(source))
    stored = lora_parameters(blueprint)
    for pool, part, linear, (rows, columns) in stored_linears(blueprint):
        rank = blueprint.pool(pool)[part].factors.get(linear)
        stored += rows * columns if rank is None else rank * (rows + columns)
    return stored / whole


def linear_budget(source: Blueprint, share: float) -> int:
    """Returns how many parameters linears with their LoRAs may have: a share of the source's linear weights."""
    return int(share * sum(rows * columns for *_, (rows, columns) in stored_linears(source)))


def factorise_evenly(blueprint: Blueprint, source: Blueprint, factor: Factor) -> tuple[Blueprint, str]:
    """Gives every stored linear the same share of its parameters as two factors.

    Args:
        blueprint: The stack with its LoRAs, whose parameters the budget has to hold as well.
        source: The source as a blueprint.
        factor: The recipe's `factor`.

    Returns:
        The blueprint, and a line on the share.

    Raises:
        RecipeError: The LoRAs leave nothing, or less than rank 1.
    """
    stored = list(stored_linears(blueprint))
    room = linear_budget(source, factor.parameters) - lora_parameters(blueprint)
    whole = sum(rows * columns for *_, (rows, columns) in stored)
    share = room / max(whole, 1)
    if share >= 1:
        return blueprint, f"factor.parameters: {factor.parameters:g} holds every stored linear whole"
    ranks: dict[tuple[Pool, int, str], int] = {
        (pool, part, name): int(share * rows * columns / (rows + columns))
        for pool, part, name, (rows, columns) in stored
    }
    if min(ranks.values()) < 1:
        raise RecipeError(
            f"factor.parameters: a share that leaves every stored linear a rank of 1 is required (got "
            f"{factor.parameters:g}, LoRAs included); raise it, or lower relax.rank"
        )
    factors: dict[tuple[Pool, int], dict[str, int | None]] = {}
    for (pool, part, name), rank in ranks.items():
        factors.setdefault((pool, part), {})[name] = rank
    note = f"factor.parameters: {factor.parameters:g} keeps {share:.1%} of every stored linear as two factors"
    return with_ranks(blueprint, {}, factors), note
