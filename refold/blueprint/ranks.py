"""LoRA ranks: from the recipe's number, names or budget to a rank for each linear."""

from collections.abc import Mapping, Sequence

from refold.blueprint.recipe import LoraRelax, RankShare
from refold.blueprint.schema import Pool
from refold.errors import RecipeError
from refold.suggest import did_you_mean

Linears = Mapping[str, tuple[int, int]]
"""Linear name to `(out, in)`."""
GROUPS = ("mixer", "mlp", "all")


def uniform_ranks(rank: int, linears: Linears) -> dict[str, int]:
    """One rank for all linears, capped at the smaller side of each; 0: none."""
    return {name: min(rank, *shape) for name, shape in linears.items()} if rank else {}


def lora_parameters(ranks: Mapping[str, int], linears: Linears) -> int:
    """Parameters of the LoRAs of one depth."""
    return sum(rank * sum(linears[name]) for name, rank in ranks.items())


def choose_ranks(
    relax: LoraRelax, pools: Mapping[Pool, Linears], tied: Sequence[Sequence[Pool]], non_embedding_parameters: int
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Chooses the rank of each linear; it holds wherever that linear is tied.

    Args:
        relax: The recipe's `relax`.
        pools: Linears of the tied pools, `mixer` and `mlp`, those of an untied or empty pool included.
        tied: For each depth the pools that are tied there.
        non_embedding_parameters: Of the source, for budgets.

    Returns:
        Linear name to rank, without those that get none; and notes.

    Raises:
        RecipeError: An unknown name, or a budget that not even rank 1 fits into.
    """
    linears = {name: shape for pool in pools.values() for name, shape in pool.items()}
    if isinstance(relax.rank, RankShare):
        return _spend(relax.rank.parameters, pools, linears, tied, non_embedding_parameters)
    largest = max(min(shape) for shape in linears.values())
    if not isinstance(relax.rank, Mapping):
        return uniform_ranks(largest if relax.rank == "full" else relax.rank, linears), ()
    legal = (*linears, *GROUPS)
    for name in relax.rank:
        if name not in legal:
            raise RecipeError(
                f"relax.rank.{name}: must name a linear or a group: {', '.join(legal)}{did_you_mean(name, legal)}"
            )
    ranks: dict[str, int] = {}
    for pool, names in pools.items():
        for name, shape in names.items():
            given: int | str = next((relax.rank[key] for key in (name, pool, "all") if key in relax.rank), 0)
            ranks[name] = min(given if isinstance(given, int) else largest, *shape)
    without = sorted({pool for pool in pools if pool in relax.rank} - {pool for depth in tied for pool in depth})
    notes = tuple(f"relax.rank.{pool}: has no effect, no {pool} is tied" for pool in without)
    return {name: rank for name, rank in ranks.items() if rank}, notes


def _spend(
    share: float,
    pools: Mapping[Pool, Linears],
    linears: Linears,
    tied: Sequence[Sequence[Pool]],
    non_embedding_parameters: int,
) -> tuple[dict[str, int], tuple[str, ...]]:
    budget = int(share * non_embedding_parameters)
    times = {pool: sum(pool in depth for depth in tied) for pool in pools}

    def spent(rank: int) -> int:
        return sum(times[pool] * lora_parameters(uniform_ranks(rank, names), names) for pool, names in pools.items())

    low, high = 0, max(min(shape) for pool, names in pools.items() if times[pool] for shape in names.values())
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if spent(middle) <= budget else (low, middle - 1)
    if low == 0:
        raise RecipeError(
            f"relax.rank.parameters: at least {spent(1):,} parameters are required for rank 1 (got {share:g} of "
            f"{non_embedding_parameters:,} = {budget:,}); raise the share"
        )
    note = f"relax.rank: {share:g} of the source's non-embedding parameters is rank {low} ({spent(low):,} parameters)"
    return uniform_ranks(low, linears), (note,)
