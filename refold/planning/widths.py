"""Widths of stored parts: neurons and key-value heads by the recipe, evenly or by measured losses."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from refold.blueprint.part_sizes import heads_obstacle
from refold.blueprint.schema import POOLS, Blueprint, Pool
from refold.errors import RecipeError
from refold.families.arch import ArchSpec, Frozen
from refold.planning.layer_lists import require_each_layer
from refold.recipe.width import Width

ROUNDS = 100
"""Halvings of the price interval; more than the bits of a double."""
SIZES: Mapping[Pool, str] = {"mixer": "num_key_value_heads", "mlp": "intermediate_size"}
"""The size of each pool that a width changes, in `ArchSpec` and in stored parts."""
KEYS: Mapping[Pool, str] = {"mixer": "heads", "mlp": "mlp"}
"""The key of each pool in the recipe's `width`."""


class Widths(NamedTuple):
    """Numbers of units by source layer; empty: as in the source."""

    mixer: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()


class WidthCurve(Frozen):
    """The predicted loss of one stored part at each width."""

    pool: Pool
    part: int
    counts: tuple[int, ...]
    """Numbers of units, ascending; the last is the whole part."""
    losses: tuple[float, ...]
    unit: int
    """Parameters of one unit."""


def choose_widths(width: Width, arch: ArchSpec) -> Widths:
    """Returns the widths of a recipe by source layer; shares are even.

    Raises:
        RecipeError: A list has not one entry for each layer, or an entry is larger than the source.
    """
    found: dict[Pool, tuple[int, ...]] = {}
    for pool in POOLS:
        given, whole = getattr(width, KEYS[pool]), getattr(arch, SIZES[pool])
        if isinstance(given, tuple):
            _require_list(f"width.{KEYS[pool]}", given, arch.num_layers, whole)
            found[pool] = given
        elif given is not None:
            found[pool] = (_even(given, whole, width.multiple if pool == "mlp" else 1),) * arch.num_layers
    return Widths(**found)


def _require_list(where: str, given: tuple[int, ...], num_layers: int, whole: int) -> None:
    require_each_layer(where, given, num_layers)
    if max(given) > whole:
        raise RecipeError(
            f"{where}: at most {whole}, as in the source, is required (got {max(given)} for layer "
            f"{given.index(max(given))}); lower it"
        )


def _even(share: float, whole: int, multiple: int) -> int:
    # The small number makes up for rounding: 0.7 of 30 heads are 21.
    count = int(share * whole + 1e-9)
    return whole if count >= whole else min(whole, max(multiple, count // multiple * multiple))


def with_widths(blueprint: Blueprint, widths: Widths) -> Blueprint:
    """Returns the blueprint with the widths of its parts; a tied part takes the width of its first layer.

    Raises:
        RecipeError: A mixer that is narrower is not the source's attention, or shares its keys and values.
    """
    made: dict[str, tuple[object, ...]] = {}
    for pool in POOLS:
        counts, whole = getattr(widths, pool), getattr(blueprint.arch, SIZES[pool])
        parts = []
        for index, part in enumerate(blueprint.pool(pool)):
            users = blueprint.users(pool, index)
            count = counts[blueprint.depths[users[0]].source] if counts else whole
            if pool == "mixer" and count < whole:
                _require_attention(blueprint, index)
            parts.append(part.model_copy(update={SIZES[pool]: count if count < whole else None}))
        made[f"{pool}s"] = tuple(parts)
    narrow = blueprint.model_copy(update=made)
    for pool in POOLS:
        _require_apart(narrow, pool)
    return narrow


def _require_apart(blueprint: Blueprint, pool: Pool) -> None:
    """Checks that no layer is the source of a narrower part besides the one that replaces it."""
    owners: dict[int, int] = {}
    for index, part in enumerate(blueprint.pool(pool)):
        for layer in source_layers(blueprint, pool, index):
            if owners.setdefault(layer, index) != index and getattr(part, SIZES[pool]) is not None:
                raise RecipeError(
                    f"width.{KEYS[pool]}: stored layers that are made from the layers tied to them are required (layer "
                    f"{layer} belongs to two of them); set fold.init to stepwise or average, or remove width"
                )


def _require_attention(blueprint: Blueprint, index: int) -> None:
    """Checks that a stored mixer can lose heads."""
    users = blueprint.users("mixer", index)
    reason = heads_obstacle(blueprint.arch, blueprint.mixers[index].mixer)
    if reason:
        raise RecipeError(
            f"width.heads: {reason} at depth {users[0]}; list the heads of each layer, or remove width.heads"
        )
    sharing = [user for user in users if blueprint.depths[user].kv or blueprint.is_read(user)]
    if sharing:
        raise RecipeError(
            f"width.heads: all key-value heads are required where share_kv shares them (got fewer at depth "
            f"{sharing[0]}); list the heads of each layer, or remove share_kv"
        )


def source_layers(blueprint: Blueprint, pool: Pool, part: int) -> list[int]:
    """Returns the source layers that a stored part replaces or is made from."""
    users = {blueprint.depths[user].source for user in blueprint.users(pool, part)}
    return sorted({*users, *blueprint.pool(pool)[part].sources})


def unit_parameters(blueprint: Blueprint, pool: Pool) -> int:
    """Returns the weights of one neuron, or of one key-value head with its query heads."""
    arch = blueprint.arch
    if pool == "mlp":
        return arch.hidden_size * (3 if arch.gated_mlp else 2)
    readers = arch.num_attention_heads // arch.num_key_value_heads
    return arch.hidden_size * arch.head_dim * 2 * (1 + readers)


def width_choices(width: Width, arch: ArchSpec, pool: Pool) -> tuple[int, ...]:
    """Returns the widths that a measured split chooses from, ascending; the last is the whole part."""
    whole, step = getattr(arch, SIZES[pool]), width.multiple if pool == "mlp" else 1
    return (*range(step, whole, step), whole)


def allocate_widths(curves: Sequence[WidthCurve], budget: int) -> list[int]:
    """Divides a number of parameters among parts so that the sum of their losses is least.

    Given a price for each parameter, every part takes the width with the lowest sum of loss and price. A bisection
    finds the lowest price whose choices fit into the budget; the rest of the budget goes to the wider choices that
    lower the loss most for each parameter.

    Args:
        curves: The parts.
        budget: Parameters of all their units together.

    Returns:
        The width of each part.

    Raises:
        RecipeError: The smallest widths do not fit into the budget.
    """
    least = sum(curve.counts[0] * curve.unit for curve in curves)
    if least > budget:
        raise RecipeError(
            f"width: at least {least:,} parameters are required for the smallest widths (got {budget:,}); raise the "
            f"shares, or lower width.multiple"
        )
    places = [0] * len(curves)
    low, high = 0.0, max((max(curve.losses) for curve in curves), default=0.0) + 1e-30
    for _ in range(ROUNDS):
        price = (low + high) / 2
        found = [_best(curve, price) for curve in curves]
        if _spent(curves, found) <= budget:
            high, places = price, found
        else:
            low = price
    return [curve.counts[place] for curve, place in zip(curves, _spend_rest(curves, places, budget), strict=True)]


def _best(curve: WidthCurve, price: float) -> int:
    costs = [loss + price * count * curve.unit for loss, count in zip(curve.losses, curve.counts, strict=True)]
    return costs.index(min(costs))


def _spent(curves: Sequence[WidthCurve], places: Sequence[int]) -> int:
    return sum(curve.counts[place] * curve.unit for curve, place in zip(curves, places, strict=True))


def _spend_rest(curves: Sequence[WidthCurve], places: list[int], budget: int) -> list[int]:
    """Widens parts step by step, each time where a parameter saves most, as long as the budget lasts."""
    places, left = list(places), budget - _spent(curves, places)
    while True:
        offers = []
        for index, (curve, place) in enumerate(zip(curves, places, strict=True)):
            for wider in range(place + 1, len(curve.counts)):
                price = (curve.counts[wider] - curve.counts[place]) * curve.unit
                if price <= left:
                    offers.append(((curve.losses[place] - curve.losses[wider]) / price, -index, wider, price))
        if not offers or max(offers)[0] <= 0:
            return places
        _, index, wider, price = max(offers)
        places[-index], left = wider, left - price


def describe_widths(blueprint: Blueprint) -> tuple[str, ...]:
    """Returns a note for each pool with the numbers of units of its parts."""
    told = []
    nouns: dict[Pool, str] = {"mlp": "neurons", "mixer": "key-value heads"}
    for pool, noun in nouns.items():
        whole = getattr(blueprint.arch, SIZES[pool])
        counts = [getattr(part, SIZES[pool]) or whole for part in blueprint.pool(pool)]
        if all(count == whole for count in counts):
            continue
        listed = str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))
        told.append(f"width.{KEYS[pool]}: {listed} of {whole} {noun} stay")
    return tuple(told)
