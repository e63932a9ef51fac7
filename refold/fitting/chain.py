"""The best parts of a model at given prices: a chain of layers, whose neighbours interact by pairs and ties."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from refold.blueprint.schema import Pool
from refold.errors import RefoldError
from refold.fitting.menu import PAIRS, PartForm, TieForm
from refold.fitting.menu_arrays import LOSS, MenuArrays, Vector
from refold.planning.replacements import PartPlace

POOLS: tuple[Pool, Pool] = ("mixer", "mlp")


class Structure(NamedTuple):
    """The chosen units of a model, without the forms of their matrices.

    Attributes:
        units: Indices of the chosen units in `MenuArrays.units`, in their order; embedding and head are 0.
        pair_loss: The losses of the pairs that left the model, scaled.
    """

    units: tuple[int, ...]
    pair_loss: float


@dataclass(frozen=True)
class _Slot:
    """A group of forms of a part between which neighbours do not tell, or its place in a tie.

    Attributes:
        role: `whole`, `kept` (in another form of the source's type), `other` (another mixer), `left`, `opens` or
            `closes` a tie, or `none` (no such part).
        needs: The part that its forms need, if any.
        units: Indices of the units to choose from: forms, or the tie; none for one that closes a tie.
    """

    role: str
    needs: PartPlace | None
    units: tuple[int, ...]
    tie: int | None = None


_NO_PART = _Slot("none", None, ())


class Chain:
    """The layers of a menu as a chain of states; a state is one slot for the mixer and one for the MLP.

    Args:
        arrays: The menu.

    Raises:
        RefoldError: A tie or a pair spans more than two neighbouring layers.
    """

    def __init__(self, arrays: MenuArrays):
        self.arrays = arrays
        self._layers = sorted({part.layer for part in arrays.menu.parts})
        self._pairs = self._losses_of_pairs()
        slots: dict[PartPlace, list[_Slot]] = {}
        for index, part in enumerate(arrays.menu.parts):
            slots[part.layer, part.pool] = self._slots_of(index)
        self._add_ties(slots)
        self._slots: list[_Slot] = [slot for each in slots.values() for slot in each] + [_NO_PART]
        numbers = {id(slot): index for index, slot in enumerate(self._slots)}
        self._states: list[list[tuple[_Slot, _Slot]]] = []
        self._pairs_within: list[Float[np.ndarray, " states"]] = []
        self._numbers: list[tuple[np.ndarray, np.ndarray]] = []
        for layer in self._layers:
            both = [slots.get((layer, pool), [_NO_PART]) for pool in POOLS]
            near: dict[PartPlace, int] = {(layer, "mixer"): 0, (layer, "mlp"): 1}
            states = [state for state in product(both[0], both[1]) if all(_is_met(slot, near, state) for slot in state)]
            self._states.append(states)
            pair = self._pairs.get(((layer, "mixer"), (layer, "mlp")), 0.0)
            self._pairs_within.append(np.array([pair * _left(*state) for state in states]))
            mixers, mlps = ([numbers[id(state[index])] for state in states] for index in range(2))
            self._numbers.append((np.array(mixers), np.array(mlps)))
        self._across = [self._between(index) for index in range(1, len(self._layers))]

    def count(self, most: int) -> int:
        """Returns the number of structures, or a number above `most`."""
        counts = np.array(
            [len(each.units) if each.role not in ("closes", "none") else 1 for each in self._slots], float
        )
        reached: np.ndarray | None = None
        for index, (mixers, mlps) in enumerate(self._numbers):
            own = counts[mixers] * counts[mlps]
            own[[_opens_beyond(state) and index == len(self._layers) - 1 for state in self._states[index]]] = 0
            if reached is not None:
                own = own * (reached @ self._across[index - 1][1])
            reached = np.minimum(own, 2.0 * most)
        return 1 if reached is None else int(min(reached.sum(), most + 1))

    def best(self, weights: Vector, barred: frozenset[int] = frozenset()) -> Structure:
        """Returns the structure with the least weighted value.

        Args:
            weights: Weights of loss and costs.
            barred: Units that may not be chosen.
        """
        chosen, _, prefixes = self._choose_slots(weights, barred)
        if not self._layers:
            return Structure((0,), 0.0)
        state = int(np.argmin(prefixes[-1][0]))
        units, pair_loss = [0], 0.0
        for index in range(len(self._layers) - 1, -1, -1):
            units += [chosen[number[state]] for number in self._numbers[index] if chosen[number[state]] >= 0]
            pair_loss += self._pairs_within[index][state]
            if index:
                before = int(prefixes[index][1][state])
                pair_loss += self._across[index - 1][0][before, state]
                state = before
        return Structure(tuple(sorted(units)), float(pair_loss))

    def alternatives(self, weights: Vector, barred: frozenset[int] = frozenset()) -> list[tuple[float, int]]:
        """Returns each unit with the least weighted value of a structure that has it, best first.

        The values leave out embedding, head and fixed costs.
        """
        if not self._layers:
            return []
        totals = self._totals(weights, barred)
        chosen, _, prefixes = self._choose_slots(weights, barred)
        suffix = np.zeros(len(self._states[-1]))
        found: dict[int, float] = {}
        for index in range(len(self._layers) - 1, -1, -1):
            # The prefix holds the value of the state itself, the suffix that of the later layers.
            value = prefixes[index][0] + suffix
            for numbers in self._numbers[index]:
                for number in set(numbers.tolist()):
                    through = value[numbers == number].min()
                    slot = self._slots[number]
                    if slot.role == "closes" or not np.isfinite(through):
                        continue
                    for unit in slot.units:
                        extra = totals[unit] - totals[chosen[number]]
                        found[unit] = min(found.get(unit, np.inf), through + extra)
            if index:
                pairs, fits = self._across[index - 1]
                own = prefixes[index][2]
                suffix = (np.where(fits, weights[LOSS] * pairs, np.inf) + (own + suffix)[None, :]).min(axis=1)
        return sorted((value, unit) for unit, value in found.items() if np.isfinite(value))

    def all_structures(self) -> list[Structure]:
        """Returns every structure; see `count`."""
        partial: list[tuple[tuple[int, ...], float, int]] = [((0,), 0.0, -1)]
        for index, states in enumerate(self._states):
            longer = []
            for units, loss, before in partial:
                for number, state in enumerate(states):
                    if before >= 0 and not self._across[index - 1][1][before, number]:
                        continue
                    if index == len(self._states) - 1 and _opens_beyond(state):
                        continue
                    added = self._pairs_within[index][number]
                    added += self._across[index - 1][0][before, number] if before >= 0 else 0.0
                    choices = [slot.units if slot.role not in ("closes", "none") else (-1,) for slot in state]
                    for pick in product(*choices):
                        more = tuple(unit for unit in pick if unit >= 0)
                        longer.append((units + more, loss + added, number))
            partial = longer
        return [Structure(tuple(sorted(units)), float(loss)) for units, loss, _ in partial]

    def _totals(self, weights: Vector, barred: frozenset[int]) -> Float[np.ndarray, " units"]:
        totals = self.arrays.unit_totals(weights)
        if barred:
            totals[list(barred)] = np.inf
        return totals

    def _choose_slots(
        self, weights: Vector, barred: frozenset[int]
    ) -> tuple[list[int], Float[np.ndarray, " slots"], list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
        """Returns the best unit of each slot (-1: none), its value, and the best prefixes of the chain.

        A prefix has for each state of a layer the least value up to it, the state before, and its own value.
        """
        totals = self._totals(weights, barred)
        chosen, least = [], np.zeros(len(self._slots))
        for number, slot in enumerate(self._slots):
            if slot.role in ("closes", "none"):
                chosen.append(-1)
                continue
            unit = min(slot.units, key=totals.__getitem__)
            chosen.append(unit)
            least[number] = totals[unit]
        prefixes: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for index, (mixers, mlps) in enumerate(self._numbers):
            own = least[mixers] + least[mlps] + weights[LOSS] * self._pairs_within[index]
            if index == len(self._layers) - 1:
                own[[_opens_beyond(state) for state in self._states[index]]] = np.inf
            before = np.zeros(len(own), dtype=np.int64)
            value = own
            if index:
                pairs, fits = self._across[index - 1]
                through = np.where(fits, prefixes[-1][0][:, None] + weights[LOSS] * pairs, np.inf)
                before = through.argmin(axis=0)
                value = own + through.min(axis=0)
            prefixes.append((value, before, own))
        return chosen, least, prefixes

    def _slots_of(self, index: int) -> list[_Slot]:
        grouped: dict[tuple[str, PartPlace | None], list[int]] = {}
        for place, unit in enumerate(self.arrays.units_of_part[index]):
            form = self.arrays.units[unit].form
            assert isinstance(form, PartForm)
            kept = "kept" if form.is_native else "other"
            role = "left" if form.leaves else ("whole" if place == 0 else kept)
            grouped.setdefault((role, self._needed(form, index)), []).append(unit)
        return [_Slot(role, needs, tuple(units)) for (role, needs), units in grouped.items()]

    def _needed(self, form: PartForm, index: int) -> PartPlace | None:
        """Returns the part that a form needs."""
        if form.needs is None:
            return None
        part, before = self.arrays.menu.parts[index], self.arrays.menu.parts[:index]
        if form.needs == "keys":
            before = [each for each in before if each.pool == part.pool and each.layer < part.layer]
        if not before or self._distance(before[-1].layer, part.layer) > 1:
            raise RefoldError(
                f"menu: form {form.kind} of the {part.pool} of layer {part.layer} needs {form.needs} of a part in this "
                f"layer or the one before (got none); remove the form"
            )
        return before[-1].layer, before[-1].pool

    def _add_ties(self, slots: dict[PartPlace, list[_Slot]]) -> None:
        for unit in self.arrays.tie_units:
            tie = self.arrays.units[unit].form
            assert isinstance(tie, TieForm)
            first, second = tie.layers
            if self._distance(first, second) != 1 or any((layer, tie.pool) not in slots for layer in tie.layers):
                raise RefoldError(
                    f"menu: a tie must join the {tie.pool}s of two neighbouring layers (got {first} and {second}); "
                    f"remove it"
                )
            slots[first, tie.pool].append(_Slot("opens", None, (unit,), unit))
            slots[second, tie.pool].append(_Slot("closes", None, (unit,), unit))

    def _losses_of_pairs(self) -> dict[tuple[PartPlace, PartPlace], float]:
        found: dict[tuple[PartPlace, PartPlace], float] = {}
        for pair in self.arrays.menu.pairs:
            places = [(layer, POOLS.index(pool)) for layer, pool in (pair.first, pair.second)]
            if places[0] >= places[1] or self._distance(places[0][0], places[1][0]) > 1:
                raise RefoldError(
                    f"menu: a pair must have two parts of one layer or of two neighbouring layers, in their order "
                    f"(got {pair.first} and {pair.second}); remove it"
                )
            key = (pair.first, pair.second)
            found[key] = found.get(key, 0.0) + self.arrays.scale(PAIRS) * pair.loss
        return found

    def _distance(self, first: int, second: int) -> int:
        known = {layer: index for index, layer in enumerate(self._layers)}
        return known[second] - known[first] if first in known and second in known else len(known) + 2

    def _between(self, index: int) -> tuple[Float[np.ndarray, "before after"], Bool[np.ndarray, "before after"]]:
        """Returns the losses of pairs and the allowed transitions between the states of two layers."""
        before, after = self._states[index - 1], self._states[index]
        layers = self._layers[index - 1], self._layers[index]
        places: list[PartPlace] = [(layer, pool) for layer in layers for pool in POOLS]
        near = {place: number for number, place in enumerate(places)}
        fits = np.array([[_follows(first, second, near) for second in after] for first in before])
        losses = np.zeros(fits.shape)
        for first_pool, second_pool in product(range(2), range(2)):
            loss = self._pairs.get(((layers[0], POOLS[first_pool]), (layers[1], POOLS[second_pool])), 0.0)
            if loss:
                first_left = np.array([state[first_pool].role == "left" for state in before])
                second_left = np.array([state[second_pool].role == "left" for state in after])
                losses += loss * (first_left[:, None] & second_left[None, :])
        return losses, fits


def _left(mixer: _Slot, mlp: _Slot) -> bool:
    return mixer.role == mlp.role == "left"


def _opens_beyond(state: tuple[_Slot, _Slot]) -> bool:
    return any(slot.role == "opens" for slot in state)


def _is_met(slot: _Slot, near: Mapping[PartPlace, int], state: Sequence[_Slot]) -> bool:
    """Says whether the part that a slot needs is in a form that it can use; a part that is not near is not judged."""
    if slot.needs is None or slot.needs not in near:
        return True
    role = state[near[slot.needs]].role
    return role == "whole" or (slot.role == "left" and role == "kept")


def _follows(first: tuple[_Slot, _Slot], second: tuple[_Slot, _Slot], near: Mapping[PartPlace, int]) -> bool:
    if not all(_is_met(slot, near, (*first, *second)) for slot in second):
        return False
    opened = [slot.tie if slot.role == "opens" else None for slot in first]
    return opened == [slot.tie if slot.role == "closes" else None for slot in second]
