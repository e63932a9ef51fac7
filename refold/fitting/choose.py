"""The choice of a fit: the forms with the least predicted loss within limits, or the least costs within a loss."""

from collections.abc import Collection, Iterable
from itertools import chain
from typing import NamedTuple

import numpy as np

from refold.errors import RefoldError
from refold.fitting.budget import Limits, format_quantity
from refold.fitting.chain import Chain, Structure
from refold.fitting.matrix_choice import Filled, MatrixChoice
from refold.fitting.menu import (
    PAIRS,
    QUANTITIES,
    TIE,
    ChosenPart,
    Costs,
    FitChoice,
    MatrixForm,
    Menu,
    TieForm,
    matrix_class,
)
from refold.fitting.menu_arrays import LOSS, NUM_VALUES, MenuArrays, Vector
from refold.fitting.prices import DualPrices, Goal, find_prices

MOST_STRUCTURES = 24
"""Structures whose matrices are chosen exactly, unless all are."""
ALL_STRUCTURES = 200
"""A menu with at most so many structures is searched whole."""
NUMBERS = ("loss", *QUANTITIES)


class BoundedChoice(NamedTuple):
    """A choice, and how good it can be at best.

    Attributes:
        choice: The choice; within all limits.
        prices: Price of each limited quantity: change of the objective for one unit more of it; 0: not limiting.
        bound: No choice from the menu within the limits has a lower objective (loss, or the quantity of `cheapest`).
    """

    choice: FitChoice
    prices: Costs
    bound: float


def choose(menu: Menu, limits: Limits, without: Collection[str] = ()) -> BoundedChoice:
    """Chooses the forms with the least predicted loss within limits.

    Lagrangian prices turn the limits into one weighted sum. At given prices, each matrix chooses its form, and a
    dynamic programme over the layers chooses the parts, with pairs and ties. The prices are those with the best lower
    bound; then the forms are changed one by one and in pairs, until every limit is met and no change improves.

    Args:
        menu: The menu.
        limits: Upper limits; a limit on the loss is checked too.
        without: Kinds of parts, classes of matrix forms and `tie` that may not be chosen.

    Raises:
        RefoldError: No choice meets the limits; the message has the least that is possible.
    """
    made = _Search(menu, without).run(_goal(LOSS, limits))
    if limits.loss is not None and made.choice.loss > limits.loss:
        raise RefoldError(
            f"budget: a predicted loss of at most {limits.loss:g} nats per token is required (the best choice within "
            f"the other limits has {made.choice.loss:.3g}); raise the loss or the limits"
        )
    return made


def cheapest(
    menu: Menu, quantity: str, max_loss: float, limits: Limits | None = None, without: Collection[str] = ()
) -> BoundedChoice:
    """Chooses the forms with the least of one quantity within a predicted loss, and within limits of others.

    Args:
        menu: The menu.
        quantity: One of `QUANTITIES`.
        max_loss: Most predicted loss in nats per token.
        limits: Further upper limits, perhaps one of the same quantity.
        without: As of `choose`.

    Raises:
        RefoldError: No choice meets the limits.
    """
    limits = (limits or Limits())._replace(loss=max_loss)
    made = _Search(menu, without).run(_goal(NUMBERS.index(quantity), limits))
    bound, least = getattr(limits, quantity), getattr(made.choice.costs, quantity)
    if bound is not None and least > bound:
        raise RefoldError(
            f"budget: no choice of a predicted loss of at most {max_loss:g} nats is so small (got {quantity} "
            f"{format_quantity(quantity, bound)}); the least possible is {format_quantity(quantity, least)}"
        )
    return made


def choose_several(menu: Menu, limits: Limits, k: int, without: Collection[str] = ()) -> list[BoundedChoice]:
    """Returns up to `k` different choices within limits, the least predicted loss first.

    The first is that of `choose`. The others differ from it in kind: each forbids one class that the first one uses,
    or takes losses of a class for half or double, or keeps another form of a part.

    Args:
        menu: The menu.
        limits: Upper limits.
        k: Number of choices; fewer if there are fewer.
        without: As of `choose`.

    Raises:
        RefoldError: No choice meets the limits.
    """
    first = choose(menu, limits, without)
    found = {first.choice.key: first}
    used = sorted(first.choice.losses, key=lambda name: -first.choice.losses[name])
    variants: list[tuple[Menu, tuple[str, ...]]] = [(menu, (name,)) for name in used if name not in (PAIRS, "none")]
    for name in used:
        for factor in (2.0, 0.5):
            scales = {**menu.scales, name: factor * menu.scales.get(name, 1.0)}
            variants.append((menu.model_copy(update={"scales": scales}), ()))
    for changed, barred in variants:
        if len(found) >= k:
            break
        try:
            made = choose(changed, limits, (*without, *barred))
        except RefoldError:
            continue  # Without this class the limits cannot be met.
        _add(found, made._replace(choice=predicted(menu, made.choice), bound=first.bound))
    if len(found) < k:
        search = _Search(menu, without)
        for filled, prices in search.near(_goal(LOSS, limits), 2 * k):
            if len(found) < k:
                _add(found, search.chosen(filled, prices, LOSS))
    others = sorted((each for each in found.values() if each is not first), key=lambda each: each.choice.loss)
    return [first, *others][:k]


def predicted(menu: Menu, choice: FitChoice) -> FitChoice:
    """Returns a choice with its losses by the scales and pairs of a menu."""
    losses: dict[str, float] = {}

    def lose(name: str, loss: float) -> None:
        if loss:
            losses[name] = losses.get(name, 0.0) + menu.scales.get(name, 1.0) * loss

    for part in choice.parts:
        lose(part.form.kind, part.form.loss)
    for tie, _ in choice.ties:
        lose(TIE, tie.loss)
    matrices = (*(part.matrices for part in choice.parts), *(forms for _, forms in choice.ties), choice.outer)
    for form in chain.from_iterable(forms.values() for forms in matrices):
        lose(matrix_class(form), form.loss)
    left = {(part.layer, part.pool) for part in choice.parts if part.form.leaves}
    for pair in menu.pairs:
        if pair.first in left and pair.second in left:
            lose(PAIRS, pair.loss)
    return choice._replace(loss=float(sum(losses.values())), losses=losses)


def least_possible(menu: Menu, quantity: str, without: Collection[str] = ()) -> FitChoice:
    """Returns the choice with the least of one quantity, whatever its loss; the loss decides between equals."""
    search = _Search(menu, without)
    weights = np.zeros(NUM_VALUES)
    weights[NUMBERS.index(quantity)] = 1.0
    # Losses are a few nats, costs at least thousands of bytes or FLOPs, and milliseconds at least thousandths.
    weights[LOSS] = 1e-9
    return search.at(weights)


class _Search:
    """One search through a menu."""

    def __init__(self, menu: Menu, without: Collection[str]):
        self._menu = menu
        self._arrays = MenuArrays(menu, without)
        self._chain = Chain(self._arrays)

    def run(self, goal: Goal) -> BoundedChoice:
        filled, prices = self._best(goal)
        if filled is None:
            raise RefoldError(self._refusal(goal, prices.excess))
        return self.chosen(filled, prices, goal.objective)

    def near(self, goal: Goal, count: int) -> Iterable[tuple[Filled, DualPrices[Structure]]]:
        """Yields good choices of different structures, about the best first."""
        prices = find_prices(self._solve, goal)
        filled = [MatrixChoice(self._arrays, each).fill(goal) for each in self._candidates(prices, goal, count)]
        for each in sorted((each for each in filled if each is not None), key=lambda each: each.values[goal.objective]):
            yield each, prices

    def at(self, weights: Vector) -> FitChoice:
        return self._choice(MatrixChoice(self._arrays, self._chain.best(weights)).filled_at(weights))

    def chosen(self, filled: Filled, prices: DualPrices[Structure], objective: int) -> BoundedChoice:
        weights = [0.0 if number == objective else float(weight) for number, weight in enumerate(prices.weights)]
        return BoundedChoice(
            self._choice(filled), Costs(*weights[1:]), min(prices.bound, float(filled.values[objective]))
        )

    def _solve(self, weights: Vector) -> tuple[Vector, Structure]:
        structure = self._chain.best(weights)
        return MatrixChoice(self._arrays, structure).at(weights)[0], structure

    def _best(self, goal: Goal) -> tuple[Filled | None, DualPrices[Structure]]:
        prices = find_prices(self._solve, goal)
        if not np.isfinite(prices.bound):
            return None, prices
        is_small = self._chain.count(ALL_STRUCTURES) <= ALL_STRUCTURES
        structures = self._chain.all_structures() if is_small else self._candidates(prices, goal, MOST_STRUCTURES)
        best: Filled | None = None
        for structure in structures:
            below = np.inf if best is None else float(best.values[goal.objective])
            filled = MatrixChoice(self._arrays, structure).fill(goal, is_exact=is_small, below=below)
            if filled is not None and filled.values[goal.objective] < below:
                best = filled
        if best is not None and not is_small:
            best = MatrixChoice(self._arrays, best.structure).fill(goal, is_exact=True) or best
        return best, prices

    def _candidates(self, prices: DualPrices[Structure], goal: Goal, count: int) -> list[Structure]:
        """Returns structures with a low bound at the final prices: those found on the way, and single changes."""
        near = sorted(prices.found, key=lambda each: float(each[0] @ prices.weights))
        structures = dict.fromkeys(structure for _, structure in near)
        best, *_ = structures
        chosen, made = set(best.units), []
        for _, unit in self._chain.alternatives(prices.weights):
            if len(made) >= count:
                break
            if unit not in chosen:
                made.append(self._chain.best(prices.weights, self._rivals(unit)))
        half = list(structures)[: max(count // 2, count - len(made))]
        return list(dict.fromkeys((*half, *made)))[:count]

    def _rivals(self, unit: int) -> frozenset[int]:
        """Returns the units to bar so that a unit is chosen: all others of its part, and ties of it."""
        arrays = self._arrays
        form, part = arrays.units[unit].form, arrays.units[unit].part
        if isinstance(form, TieForm):
            places = {(layer, form.pool) for layer in form.layers}
        else:
            assert part is not None
            places = {(part.layer, part.pool)}
        barred: set[int] = set()
        for index, units in enumerate(arrays.units_of_part):
            if (self._menu.parts[index].layer, self._menu.parts[index].pool) in places:
                barred |= set(units)
        for other in arrays.tie_units:
            tie = arrays.units[other].form
            assert isinstance(tie, TieForm)
            if places & {(layer, tie.pool) for layer in tie.layers}:
                barred.add(other)
        return frozenset(barred - {unit})

    def _choice(self, filled: Filled) -> FitChoice:
        arrays = self._arrays
        parts: list[ChosenPart] = []
        ties: list[tuple[TieForm, dict[str, MatrixForm]]] = []
        outer: dict[str, MatrixForm] = {}
        place = 0
        for index in filled.structure.units:
            unit = arrays.units[index]
            made = [arrays.form(each) for each in filled.forms[place : place + len(unit.matrices)]]
            forms = {matrix.name: form for matrix, form in zip(unit.matrices, made, strict=True)}
            place += len(made)
            if unit.form is None:
                outer = forms
            elif isinstance(unit.form, TieForm):
                ties.append((unit.form, forms))
            else:
                assert unit.part is not None
                parts.append(ChosenPart(unit.part.layer, unit.part.pool, unit.form, forms))
        costs = Costs(*(float(value) for value in filled.values[1:]))
        return predicted(self._menu, FitChoice(tuple(parts), tuple(ties), outer, 0.0, {}, costs))

    def _refusal(self, goal: Goal, excess: float) -> str:
        """Returns the message that names the least that is possible of each limited quantity."""
        asked, alone, together = [], [], []
        for number, bound in goal.limits.items():
            name = NUMBERS[number]
            weights = np.zeros(NUM_VALUES)
            weights[number] = 1.0
            least = float(self._solve(weights)[0][number])
            asked.append(f"{name} {format_quantity(name, bound)}")
            if least > bound:
                alone.append(f"{name} {format_quantity(name, least)}")
            else:
                others = {each: limit for each, limit in goal.limits.items() if each != number}
                filled = self._best(Goal(number, others))[0] if others else None
                if filled is not None:
                    together.append(f"{name} {format_quantity(name, float(filled.values[number]))}")
        got = " and ".join(asked)
        if alone:
            return f"budget: no choice is so small (got {got}); the least possible is {' and '.join(alone)}"
        if together:
            return (
                f"budget: no choice meets all limits together (got {got}); with the others as they are, the least "
                f"possible is {' or '.join(together)}"
            )
        return f"budget: no choice meets all limits together (got {got}); raise all of them by {max(excess, 0.001):.1%}"


def _goal(objective: int, limits: Limits) -> Goal:
    bounds = (limits.loss, limits.bytes, limits.cache, limits.flops, limits.milliseconds)
    given = {number: float(bound) for number, bound in enumerate(bounds) if bound is not None}
    given.pop(objective, None)
    return Goal(objective, given)


def _add(found: dict[tuple[object, ...], BoundedChoice], made: BoundedChoice) -> None:
    found.setdefault(made.choice.key, made)
