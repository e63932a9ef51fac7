"""The forms of all matrices of one structure, chosen so that every limit is met exactly."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from refold.fitting.chain import Structure
from refold.fitting.menu_arrays import LOSS, MenuArrays, Vector, least_forms
from refold.fitting.prices import Goal, find_prices

NUM_EXCHANGED = 192
"""Changes of one matrix that are tried in pairs: those with the least reduced cost."""
NUM_TAKEN = 64
"""Changes that are made, as far as they still fit, before all gains are computed again."""
MOST_PARTIAL = 3000
"""Partial choices that the exact search keeps; fewer: the search has seen every choice that could be better."""
NUM_STARTS = 2
"""Solutions from the search for prices that are improved: so many within the limits or nearly, so many of low bound."""


class Filled(NamedTuple):
    """A structure with chosen forms.

    Attributes:
        structure: The structure.
        forms: Index of the form of each matrix of the structure, in the order of units and of their matrices.
        values: Loss and costs.
        bound: No choice of forms for this structure has a lower objective.
    """

    structure: Structure
    forms: tuple[int, ...]
    values: Vector
    bound: float


class MatrixChoice:
    """The choice of one form for each matrix of a structure.

    Args:
        arrays: The menu.
        structure: The chosen units.
    """

    def __init__(self, arrays: MenuArrays, structure: Structure):
        self._structure = structure
        units = list(structure.units)
        self._base = arrays.fixed + arrays.unit_values[units].sum(axis=0)
        self._base[LOSS] += structure.pair_loss
        matrices = [index for unit in units for index in arrays.units[unit].indices]
        counts = arrays.counts[matrices]
        self._index: Int[np.ndarray, " forms"] = np.concatenate(
            [np.arange(arrays.starts[each], arrays.starts[each] + arrays.counts[each]) for each in matrices]
            or [np.zeros(0, dtype=np.int64)]
        )
        self._values = arrays.form_values[self._index]
        self._counts, self._starts = counts, np.cumsum(counts) - counts
        self._owner = np.repeat(np.arange(len(matrices)), counts)

    def at(self, weights: Vector) -> tuple[Vector, Int[np.ndarray, " matrices"]]:
        """Returns the values and the forms with the least weighted sum."""
        forms = least_forms(self._values @ weights, self._starts, self._counts)
        return self._sum(forms), forms

    def filled_at(self, weights: Vector) -> Filled:
        """Returns the structure with the forms of the least weighted sum."""
        values, forms = self.at(weights)
        return Filled(self._structure, tuple(self._index[forms].tolist()), values, float(values @ weights))

    def fill(self, goal: Goal, is_exact: bool = False, below: float = np.inf) -> Filled | None:
        """Chooses forms within the limits; None if none are found, or none can have an objective below a number.

        Args:
            goal: Objective and limits.
            is_exact: Also search all choices whose bound is better than the best one found.
            below: Only choices with a lower objective are wanted.
        """
        prices = find_prices(self.at, goal)
        if not prices.bound < below:
            return None
        weighted = sorted(
            prices.found, key=lambda each: (goal.excess(each[0]).max(initial=0.0), each[0][goal.objective])
        )
        near = sorted(prices.found, key=lambda each: float(each[0] @ prices.weights))
        best: tuple[Vector, Int[np.ndarray, " matrices"]] | None = None
        for _, forms in (*weighted[:NUM_STARTS], *near[:NUM_STARTS]):
            improved = self._improve(forms, prices.weights, goal)
            if improved is not None and (best is None or improved[0][goal.objective] < best[0][goal.objective]):
                best = improved
        if is_exact:
            best = self._search(best, prices.weights, prices.bound, goal)
        if best is None:
            return None
        return Filled(self._structure, tuple(self._index[best[1]].tolist()), best[0], prices.bound)

    def _sum(self, forms: Int[np.ndarray, " matrices"]) -> Vector:
        return self._base + self._values[forms].sum(axis=0)

    def _improve(
        self, forms: Int[np.ndarray, " matrices"], weights: Vector, goal: Goal
    ) -> tuple[Vector, Int[np.ndarray, " matrices"]] | None:
        """Brings a choice within the limits, then changes one form or two while that lowers the objective."""
        forms = forms.copy()
        if not self._repair(forms, weights, goal):
            return None
        while self._upgrade(forms, goal) or self._exchange(forms, weights, goal):
            pass
        return self._sum(forms), forms

    def _changes(self, forms: Int[np.ndarray, " matrices"]) -> Float[np.ndarray, "forms 5"]:
        return self._values - self._values[forms][self._owner]

    def _repair(self, forms: Int[np.ndarray, " matrices"], weights: Vector, goal: Goal) -> bool:
        values = self._sum(forms)
        while not goal.fits(values):
            changes = self._changes(forms)
            after = np.maximum(goal.excess(values + changes), 0.0).sum(axis=1)
            gained = np.maximum(goal.excess(values), 0.0).sum() - after
            useful = gained > 1e-15
            if not useful.any():
                return False
            price = np.full(len(changes), np.inf)
            price[useful] = np.maximum(changes[useful] @ weights, 1e-15) / gained[useful]
            chosen = int(np.argmin(price))
            forms[self._owner[chosen]] = chosen
            values = self._sum(forms)
        return True

    def _upgrade(self, forms: Int[np.ndarray, " matrices"], goal: Goal) -> bool:
        """Changes single forms within the limits, the largest gain first; returns whether any was changed."""
        changed, took = False, True
        while took:
            took = False
            values, changes = self._sum(forms), self._changes(forms)
            gain = -changes[:, goal.objective]
            gain[~self._within(values + changes, goal)] = 0.0
            done: set[int] = set()
            for chosen in _largest(gain, _least_gain(values, goal)):
                # The gain of a second form of one matrix would be counted against the form before.
                if int(self._owner[chosen]) not in done and self._take(forms, (int(chosen),), goal):
                    done.add(int(self._owner[chosen]))
                    changed = took = True
        return changed

    def _exchange(self, forms: Int[np.ndarray, " matrices"], weights: Vector, goal: Goal) -> bool:
        """Changes two forms within the limits if that lowers the objective; returns whether it did."""
        values, changes = self._sum(forms), self._changes(forms)
        reduced = changes @ weights
        reduced[forms] = np.inf
        some = np.arange(len(reduced))
        if len(some) > NUM_EXCHANGED:
            some = np.argpartition(reduced, NUM_EXCHANGED)[:NUM_EXCHANGED]
        some = some[np.isfinite(reduced[some])]
        both = changes[some][:, None] + changes[some][None, :]
        gain = -both[..., goal.objective]
        gain[~self._within(values + both, goal)] = 0.0
        gain[self._owner[some][:, None] <= self._owner[some][None, :]] = 0.0
        took, done = False, set()
        for place in _largest(gain.ravel(), _least_gain(values, goal)):
            one, two = (int(some[each]) for each in np.unravel_index(place, gain.shape))
            owners = {int(self._owner[one]), int(self._owner[two])}
            if not owners & done and self._take(forms, (one, two), goal):
                done |= owners
                took = True
        return took

    def _take(self, forms: Int[np.ndarray, " matrices"], chosen: tuple[int, ...], goal: Goal) -> bool:
        """Makes changes if the exact sum is within the limits and better; returns whether it did."""
        before, owners = self._sum(forms), self._owner[list(chosen)]
        kept = forms[owners]
        forms[owners] = chosen
        after = self._sum(forms)
        if goal.fits(after) and before[goal.objective] - after[goal.objective] > _least_gain(before, goal):
            return True
        forms[owners] = kept
        return False

    def _within(self, values: Float[np.ndarray, "*any 5"], goal: Goal) -> Any:
        return np.all(goal.excess(values) <= 1e-12, axis=-1)

    def _search(
        self, best: tuple[Vector, Int[np.ndarray, " matrices"]] | None, weights: Vector, bound: float, goal: Goal
    ) -> tuple[Vector, Int[np.ndarray, " matrices"]] | None:
        """Searches the choices whose bound is better than the best one: matrix by matrix, by the sum of reduced costs.

        A form with a reduced cost above the gap between the best choice and the bound is in no better choice. The
        search is exact as long as at most `MOST_PARTIAL` partial choices are left.
        """
        reduced = self._values @ weights
        if len(self._starts):
            reduced = reduced - np.minimum.reduceat(reduced, self._starts)[self._owner]
        gap = np.inf if best is None else best[0][goal.objective] - bound
        sums, values = np.zeros(1), self._base[None, :].copy()
        picks: list[tuple[np.ndarray, np.ndarray]] = []
        for start, count in zip(self._starts.tolist(), self._counts.tolist(), strict=True):
            own = start + np.flatnonzero(reduced[start : start + count] <= gap)
            longer = (sums[:, None] + reduced[own][None, :]).ravel()
            kept = np.flatnonzero(longer <= gap)
            if len(kept) > MOST_PARTIAL:
                kept = kept[np.argpartition(longer[kept], MOST_PARTIAL)[:MOST_PARTIAL]]
            parent, form = kept // max(1, len(own)), own[kept % max(1, len(own))] if len(own) else kept
            sums, values = longer[kept], values[parent] + self._values[form]
            picks.append((parent, form))
        order = np.argsort(values[:, goal.objective])
        for place in order[self._within(values[order], goal)][:16].tolist():
            forms = np.zeros(len(picks), dtype=np.int64)
            for matrix in range(len(picks) - 1, -1, -1):
                parent, form = picks[matrix]
                forms[matrix], place = form[place], parent[place]
            exact = self._sum(forms)
            if goal.fits(exact) and (best is None or exact[goal.objective] < best[0][goal.objective]):
                return exact, forms
        return best


def _largest(gain: Float[np.ndarray, " any"], least: float) -> Int[np.ndarray, " some"]:
    """Returns the places of the largest gains above a number, the largest first."""
    places = np.flatnonzero(gain > least)
    if len(places) > NUM_TAKEN:
        places = places[np.argpartition(-gain[places], NUM_TAKEN)[:NUM_TAKEN]]
    return places[np.argsort(-gain[places], kind="stable")]


def _least_gain(values: Vector, goal: Goal) -> float:
    return 1e-12 * max(1e-6, abs(values[goal.objective]))
