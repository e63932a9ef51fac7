"""The choice of layers, token mixers and MLPs to drop."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from refold.blueprint.schema import POOLS, Pool
from refold.errors import RecipeError
from refold.recipe.drop import BlockDrop, Drop, Dropping, PartDrop, SublayerDrop
from refold.recipe.tying import evenly_spaced
from refold.sources.measurements import Influence

T = TypeVar("T", bound=Hashable)
NAMES: Mapping[Pool, str] = {"mixer": "attention", "mlp": "mlp"}
"""The name of each pool in recipes and measurements."""


def dropped_blocks(
    drop: BlockDrop, num_layers: int, layer_parameters: int, other_parameters: int, influence: Influence | None = None
) -> frozenset[int]:
    """Returns the source layers to drop as a whole.

    Args:
        drop: The recipe's `drop.block`.
        num_layers: Number of source layers.
        layer_parameters: Parameters of one layer.
        other_parameters: Non-embedding parameters outside the layers: the final norm.
        influence: Measured influence; None: the kept layers are evenly spaced.

    Raises:
        RecipeError: Nothing would remain, or a layer is out of range.
    """
    if drop.parameters is not None:
        kept = min(num_layers, (drop.parameters - other_parameters) // layer_parameters)
        if kept < 1:
            raise RecipeError(
                f"drop.block.parameters: at least {layer_parameters + other_parameters:,} are required for one layer "
                f"(got {drop.parameters:,}); raise the budget"
            )
        drop = BlockDrop(count=num_layers - kept, by=drop.by)
    scores = None if influence is None else influence.block
    dropped = _dropped(drop, tuple(range(num_layers)), "drop.block", num_layers, scores)
    if len(dropped) == num_layers:
        raise RecipeError(f"drop.block: at least one layer must remain (all {num_layers} would go); drop fewer")
    return dropped


def dropped_parts(
    drop: Drop,
    layers: Sequence[int],
    num_layers: int,
    parameters: Mapping[Pool, int],
    other_parameters: int,
    influence: Influence | None = None,
) -> dict[Pool, frozenset[int]]:
    """Returns for each pool the source layers whose attention, or whose MLP, is dropped.

    Args:
        drop: The recipe's `drop`.
        layers: Source layers that are not dropped as a whole.
        num_layers: Number of source layers.
        parameters: Parameters of one attention, and of one MLP, norms included.
        other_parameters: Non-embedding parameters outside the layers: the final norm.
        influence: Measured influence; None: the kept parts are evenly spaced.

    Raises:
        RecipeError: The count is too large, or a layer is out of range or already dropped.
    """
    if drop.sublayers is not None:
        return _dropped_sublayers(drop.sublayers, layers, parameters, other_parameters, influence)
    found: dict[Pool, frozenset[int]] = {}
    for pool, name in NAMES.items():
        each: PartDrop | None = getattr(drop, name)
        scores = None if influence is None else getattr(influence, name)
        found[pool] = _dropped(each, tuple(layers), f"drop.{name}", num_layers, scores) if each else frozenset()
    return found


def describe_dropped(
    drop: Drop, influence: Influence | None, blocks: frozenset[int], parts: Mapping[Pool, frozenset[int]]
) -> tuple[str, ...]:
    """Returns a note about a choice that depends on measured influence; nothing for other choices."""
    if not drop.by_influence:
        return ()
    if influence is None:
        return (UNMEASURED_DROP,)
    kinds = (("layers", blocks), ("attention of layers", parts["mixer"]), ("MLP of layers", parts["mlp"]))
    said = "; ".join(f"{name} {', '.join(map(str, sorted(gone)))}" for name, gone in kinds if gone)
    return (f"dropped, by measured influence: {said or 'nothing'}",)


UNMEASURED_DROP = (
    "drop: influence is not measured yet, so this plan drops evenly spaced parts: give the results of `refold analyse` "
    "with --measurements, or let convert measure it on --calibration text"
)


def _dropped(
    drop: PartDrop, layers: tuple[int, ...], where: str, num_layers: int, scores: Sequence[float] | None
) -> frozenset[int]:
    if drop.layers is not None:
        for layer in drop.layers:
            if layer >= num_layers:
                raise RecipeError(
                    f"{where}.layers: layer {layer} is out of range ({num_layers} source layers: 0..{num_layers - 1})"
                )
            if layer not in layers:
                raise RecipeError(f"{where}.layers: layer {layer} is dropped already; remove it from the list")
        return frozenset(drop.layers)
    count = _count(drop, len(layers), where)
    return _chosen(drop, layers, None if scores is None else lambda layer: scores[layer])(count)


def _dropped_sublayers(
    drop: SublayerDrop,
    layers: Sequence[int],
    parameters: Mapping[Pool, int],
    other_parameters: int,
    influence: Influence | None,
) -> dict[Pool, frozenset[int]]:
    every: tuple[tuple[Pool, int], ...] = tuple((pool, layer) for layer in layers for pool in POOLS)

    def score(part: tuple[Pool, int]) -> float:
        return getattr(influence, NAMES[part[0]])[part[1]]

    choose = _chosen(drop, every, None if influence is None else score)

    def remaining(count: int) -> int:
        return other_parameters + sum(parameters[pool] for pool, layer in every if (pool, layer) not in choose(count))

    if drop.parameters is not None:
        budget = drop.parameters
        count = next((count for count in range(len(every)) if remaining(count) <= budget), None)
        if count is None:
            raise RecipeError(
                f"drop.sublayers.parameters: at least {remaining(len(every) - 1):,} are required for one of them "
                f"(got {budget:,}); raise the budget"
            )
    else:
        count = _count(drop, len(every), "drop.sublayers")
    if count == len(every):
        raise RecipeError(f"drop.sublayers: at least one must remain (all {count} would go); drop fewer")
    gone = choose(count)
    return {pool: frozenset(layer for kind, layer in gone if kind == pool) for pool in POOLS}


def _count(drop: Dropping, available: int, where: str) -> int:
    count = drop.count if drop.share is None else round(drop.share * available)
    assert count is not None
    if count > available:
        raise RecipeError(f"{where}.count: must be at most {available} (got {count}); lower it")
    return count


def _chosen(
    drop: Dropping, candidates: tuple[T, ...], score: Callable[[T], float] | None
) -> Callable[[int], frozenset[T]]:
    """Returns a function that maps a number of parts to the set of parts to drop."""
    if drop.by != "even" and score is not None:
        ranked = sorted(candidates, key=score)
        return lambda count: frozenset(ranked[:count])
    size = len(candidates)
    return lambda count: frozenset(candidates) - {candidates[index] for index in evenly_spaced(size, size - count)}
