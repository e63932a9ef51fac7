"""Prices of limited quantities: the Lagrangian dual of a choice, solved by Dantzig-Wolfe decomposition."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from refold.fitting.menu_arrays import NUM_VALUES, Vector

MOST_ROUNDS = 300
GAP = 1e-7
"""Relative difference of the two bounds at which the prices are good enough."""
_TINY = 1e-11
T = TypeVar("T")


class Goal(NamedTuple):
    """The objective and the limits; numbers index loss, bytes, cache, FLOPs, milliseconds.

    Attributes:
        objective: The number that is minimised.
        limits: Upper limits of other numbers.
    """

    objective: int
    limits: dict[int, float]

    @property
    def limited(self) -> list[int]:
        """The limited numbers."""
        return list(self.limits)

    def excess(self, values: Float[np.ndarray, "*any 5"]) -> Float[np.ndarray, "*any limits"]:
        """Returns by how much values lie above each limit, as a share of it; at most 0: within."""
        bounds = np.array([self.limits[each] for each in self.limited])
        return (values[..., self.limited] - bounds) / self.units

    @property
    def units(self) -> Float[np.ndarray, " limits"]:
        """The unit of each limit: the limit, or 1 if it is 0."""
        return np.array([abs(bound) or 1.0 for bound in self.limits.values()])

    def fits(self, values: Vector) -> bool:
        """Says whether values are within all limits, exactly."""
        return all(values[number] <= bound for number, bound in self.limits.items())


@dataclass(frozen=True)
class DualPrices(Generic[T]):
    """The result of a search for prices.

    Attributes:
        weights: Weights of the five numbers: 1 for the objective, prices for limited ones.
        bound: No choice within the limits has a lower objective; infinite: no choice meets the limits.
        found: All solutions that were found on the way, with their values.
        excess: Least share by which all limits together must be raised to be met; 0: they can be met by mixtures.
    """

    weights: Vector
    bound: float
    found: list[tuple[Vector, T]]
    excess: float


def find_prices(solve: Callable[[Vector], tuple[Vector, T]], goal: Goal) -> DualPrices[T]:
    """Finds the prices at which the weighted optimum gives the highest lower bound.

    The master problem mixes known solutions so that the mixture is within the limits and its objective is least; its
    dual values are the prices, at which `solve` finds the next solution (Dantzig and Wolfe 1960). The bound is the
    Lagrangian's, so it holds whenever the rounds end.

    Args:
        solve: Returns the values of the solution with the least weighted sum, and the solution.
        goal: Objective and limits.
    """
    weights = np.zeros(NUM_VALUES)
    weights[goal.objective] = 1.0
    values, solution = solve(weights)
    found = [(values, solution)]
    if goal.fits(values):
        return DualPrices(weights, float(values[goal.objective]), found, 0.0)
    master = _Master(len(goal.limits), goal.excess(values), values[goal.objective])
    excess = _reach_limits(solve, goal, master, found)
    if excess > 0:
        return DualPrices(weights, np.inf, found, excess)
    best, best_weights = -np.inf, weights
    for _ in range(MOST_ROUNDS):
        prices, mixed = master.solve(is_first_phase=False)
        weights = _weights(goal, prices, 1.0)
        values, solution = solve(weights)
        found.append((values, solution))
        bound = float(values[goal.objective] + prices @ goal.excess(values))
        if bound > best:
            best, best_weights = bound, weights
        if mixed - best <= GAP * abs(mixed) + 1e-15 or not master.add(goal.excess(values), values[goal.objective]):
            break
    return DualPrices(best_weights, best, found, 0.0)


def _reach_limits(
    solve: Callable[[Vector], tuple[Vector, T]], goal: Goal, master: "_Master", found: list[tuple[Vector, T]]
) -> float:
    """Adds solutions until a mixture meets all limits; returns the least excess, 0 if there is such a mixture."""
    for _ in range(MOST_ROUNDS):
        prices, excess = master.solve(is_first_phase=True)
        if excess <= _TINY:
            return 0.0
        values, solution = solve(_weights(goal, prices, 0.0))
        found.append((values, solution))
        reached = float(prices @ goal.excess(values))
        if excess - reached <= 1e-9 or not master.add(goal.excess(values), values[goal.objective]):
            return float(excess)
    return float(excess)


def _weights(goal: Goal, prices: Float[np.ndarray, " limits"], objective: float) -> Vector:
    weights = np.zeros(NUM_VALUES)
    weights[goal.limited] = prices / goal.units
    weights[goal.objective] = objective
    return weights


class _Master:
    """min sum_i w_i L_i with sum_i w_i e_i <= t, sum_i w_i = 1, w >= 0: a linear program with few rows.

    The first phase minimises t >= 0; in the second, t is 0. Columns: t, one slack for each limit, the solutions.
    """

    def __init__(self, num_limits: int, excess: Float[np.ndarray, " limits"], objective: float):
        self._rows = num_limits + 1
        slacks = np.vstack([np.eye(num_limits), np.zeros((1, num_limits))])
        t = np.append(-np.ones(num_limits), 0.0)[:, None]
        self._columns = np.hstack([t, slacks, np.append(excess, 1.0)[:, None]])
        self._costs = np.append(np.zeros(num_limits + 1), objective)
        worst = int(np.argmax(excess))
        # t takes the place of the slack of the limit that is exceeded most.
        self._basis = [0 if row == worst else 1 + row for row in range(num_limits)] + [num_limits + 1]

    def add(self, excess: Float[np.ndarray, " limits"], objective: float) -> bool:
        """Adds a solution; returns whether it is new."""
        column = np.append(excess, 1.0)
        same = np.abs(self._columns[:, self._rows :] - column[:, None]).max(axis=0) <= 1e-14
        if (same & (self._costs[self._rows :] <= objective)).any():
            return False
        self._columns = np.hstack([self._columns, column[:, None]])
        self._costs = np.append(self._costs, objective)
        return True

    def solve(self, is_first_phase: bool) -> tuple[Float[np.ndarray, " limits"], float]:
        """Returns the prices and the optimum, by the simplex method from the last basis."""
        right = np.append(np.zeros(self._rows - 1), 1.0)
        costs = np.zeros_like(self._costs) if is_first_phase else self._costs.copy()
        # In the second phase t may still stand in the basis at 0; a high cost keeps it there.
        costs[0] = 1.0 if is_first_phase else 1e6 * max(1e-9, np.abs(self._costs).max())
        for round_ in range(2000):
            base = self._columns[:, self._basis]
            amounts = np.linalg.solve(base, right)
            duals = np.linalg.solve(base.T, costs[self._basis])
            reduced = costs - duals @ self._columns
            reduced[self._basis] = 0.0
            threshold = -1e-12 * max(1.0, np.abs(costs[self._basis]).max())
            if is_first_phase is False:
                reduced[0] = 0.0
            # Bland's rule ends every cycle; before, the most negative reduced cost is faster.
            entering = int(np.argmin(reduced)) if round_ < 200 else int(np.argmax(reduced < threshold))
            if reduced[entering] >= threshold:
                break
            direction = np.linalg.solve(base, self._columns[:, entering])
            ratios = np.full(self._rows, np.inf)
            grows = direction > 1e-12
            ratios[grows] = np.maximum(amounts[grows], 0.0) / direction[grows]
            if not grows.any():
                break
            leaving = int(np.argmin(ratios))
            self._basis[leaving] = entering
        return np.maximum(-duals[: self._rows - 1], 0.0), float(costs[self._basis] @ amounts)
