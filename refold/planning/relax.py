"""The LoRA ranks and prefixes of each depth, by the recipe's `relax`."""

from collections.abc import Mapping, Sequence

from refold.blueprint.schema import Blueprint, Pool
from refold.errors import RecipeError
from refold.recipe.recipe import LoraRelax, PrefixRelax, RankEnergy, RankShare
from refold.suggest import did_you_mean

LinearShapes = Mapping[str, tuple[int, int]]
"""Linear name to `(out, in)`."""
GROUPS = ("mixer", "mlp", "all")


def uniform_ranks(rank: int, linears: LinearShapes) -> dict[str, int]:
    """Returns one rank for all linears, capped at the smaller side of each; rank 0: no LoRAs."""
    return {name: min(rank, *shape) for name, shape in linears.items()} if rank else {}


def lora_parameters(ranks: Mapping[str, int], linears: LinearShapes) -> int:
    """Counts the parameters of the LoRAs of one depth."""
    return sum(rank * sum(linears[name]) for name, rank in ranks.items())


def choose_ranks(
    relax: LoraRelax,
    tied: Sequence[Mapping[Pool, LinearShapes]],
    known: Mapping[Pool, LinearShapes],
    non_embedding_parameters: int,
) -> tuple[list[dict[str, int]], tuple[str, ...]]:
    """Chooses the rank of each linear at each depth.

    Args:
        relax: The recipe's `relax`. Ranks that need a measurement are even here, or for `energy` the full ranks.
        tied: For each depth its tied linears, by pool.
        known: All linears that a recipe may name, tied or not.
        non_embedding_parameters: Non-embedding parameters of the source, for budgets.

    Returns:
        For each depth the ranks by linear, without linears that get no LoRA; and notes.

    Raises:
        RecipeError: An unknown name, or a budget too small for rank 1.
    """
    if isinstance(relax.rank, RankShare) and relax.rank.parameters is None:
        return [_uniform(1, depth) for depth in tied], ()
    if isinstance(relax.rank, RankShare):
        assert relax.rank.parameters is not None
        rank, notes = _spend(relax.rank.parameters, tied, non_embedding_parameters)
        return [_uniform(rank, depth) for depth in tied], notes
    largest = max(min(shape) for pool in known.values() for shape in pool.values())
    if isinstance(relax.rank, RankEnergy):
        return [_uniform(largest, depth) for depth in tied], ()
    if not isinstance(relax.rank, Mapping):
        rank = largest if relax.rank == "full" else relax.rank
        return [_uniform(rank, depth) for depth in tied], ()
    legal = (*(name for names in known.values() for name in names), *GROUPS)
    for name in relax.rank:
        if name not in legal:
            raise RecipeError(
                f"relax.rank.{name}: must name a linear or a group: {', '.join(legal)}{did_you_mean(name, legal)}"
            )
    found: list[dict[str, int]] = []
    for depth in tied:
        ranks: dict[str, int] = {}
        for pool, names in depth.items():
            for name, shape in names.items():
                given: int | str = next((relax.rank[key] for key in (name, pool, "all") if key in relax.rank), 0)
                ranks[name] = min(given if isinstance(given, int) else largest, *shape)
        found.append({name: rank for name, rank in ranks.items() if rank})
    without = sorted({pool for pool in known if pool in relax.rank} - {pool for depth in tied for pool in depth})
    notes = tuple(f"relax.rank.{pool}: has no effect, no {pool} is tied" for pool in without)
    return found, notes


def _uniform(rank: int, depth: Mapping[Pool, LinearShapes]) -> dict[str, int]:
    return {name: each for names in depth.values() for name, each in uniform_ranks(rank, names).items()}


def _spend(
    share: float, tied: Sequence[Mapping[Pool, LinearShapes]], non_embedding_parameters: int
) -> tuple[int, tuple[str, ...]]:
    budget = int(share * non_embedding_parameters)

    def spent(rank: int) -> int:
        return sum(lora_parameters(uniform_ranks(rank, names), names) for depth in tied for names in depth.values())

    shapes = [shape for depth in tied for names in depth.values() for shape in names.values()]
    low, high = 0, max(min(shape) for shape in shapes)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if spent(middle) <= budget else (low, middle - 1)
    if low == 0:
        raise RecipeError(
            f"relax.rank.parameters: at least {spent(1):,} parameters are required for rank 1 (got {share:g} of "
            f"{non_embedding_parameters:,} = {budget:,}); raise the share"
        )
    note = f"relax.rank: {share:g} of the source's non-embedding parameters is rank {low} ({spent(low):,} parameters)"
    return low, (note,)


def with_prefixes(blueprint: Blueprint, relax: LoraRelax | PrefixRelax | None) -> Blueprint:
    """Returns the stack with a prefix at each relaxed depth that has a mixer.

    Raises:
        RecipeError: No depth would get a prefix, or a depth would that computes no keys and values, because its mixer
            has none or it reads those of another depth.
    """
    if not isinstance(relax, PrefixRelax):
        return blueprint
    places = tuple(
        index
        for index, depth in enumerate(blueprint.depths)
        if depth.mixer is not None and (relax.at == "all" or len(blueprint.users("mixer", depth.mixer)) > 1)
    )
    if not places:
        raise RecipeError(
            "relax: tied attention is required for prefixes (no stored attention is used twice); set fold.loops to 2 "
            "or more with mixer in fold.tie, or relax.at to all"
        )
    for index in places:
        depth = blueprint.depths[index]
        assert depth.mixer is not None
        mixer = blueprint.mixers[depth.mixer].mixer
        if not mixer.key_value_names:
            raise RecipeError(
                f"relax.type: softmax attention is required for prefixes (depth {index} has {mixer.type}, whose state "
                f"takes no extra keys); use lora, or remove mixers"
            )
        if not blueprint.made_heads(index):
            raise RecipeError(
                f"relax.type: keys and values of its own are required for a prefix (depth {index} reads those of depth "
                f"{depth.kv[0].depth}); use lora, or remove share_kv"
            )
    depths = tuple(
        depth.model_copy(update={"prefix": relax.length}) if index in places else depth
        for index, depth in enumerate(blueprint.depths)
    )
    return blueprint.model_copy(update={"depths": depths})
