"""Prices of limits, against a search of the dual function."""

import numpy as np
import pytest

from refold.fitting.menu_arrays import Vector
from refold.fitting.prices import Goal, find_prices


class Items:
    """Independent items, each with forms that lose more the less they cost; counts how often it is solved."""

    def __init__(self, seed: int, num_items: int = 40, num_forms: int = 12):
        draw = np.random.default_rng(seed)
        share = np.linspace(0, 1, num_forms)
        self.values = np.zeros((num_items, num_forms, 5))
        self.values[..., 0] = draw.lognormal(size=(num_items, 1)) * (1 - share) ** 2
        for number, scale in ((1, 1e9), (2, 1e6), (3, 1e12)):
            cost = scale * draw.uniform(0.5, 2, (num_items, 1)) * share
            self.values[..., number] = cost * draw.uniform(0.7, 1.3, (num_items, num_forms))
        self.solved = 0

    def solve(self, weights: Vector) -> tuple[Vector, tuple[int, ...]]:
        self.solved += 1
        forms = (self.values @ weights).argmin(axis=1)
        return self.values[np.arange(len(forms)), forms].sum(axis=0), tuple(forms.tolist())

    def bound(self, prices: dict[int, float], limits: dict[int, float]) -> float:
        weights = np.zeros(5)
        weights[0] = 1.0
        for number, price in prices.items():
            weights[number] = price
        least = (self.values @ weights).min(axis=1).sum()
        return float(least - sum(prices[number] * bound for number, bound in limits.items()))

    def whole(self, number: int) -> float:
        return float(self.values[:, :, number].max(axis=1).sum())


@pytest.mark.parametrize("seed", range(3))
def test_one_price_is_the_best_of_a_fine_grid(seed: int) -> None:
    items = Items(seed)
    limits = {1: 0.4 * items.whole(1)}
    found = find_prices(items.solve, Goal(0, limits))
    grid = np.geomspace(1e-12, 1e-7, 4000)
    best = max(items.bound({1: float(price)}, limits) for price in grid)
    assert found.bound >= best - 1e-9
    assert found.bound == pytest.approx(best, rel=1e-3)
    assert found.bound == pytest.approx(items.bound({1: float(found.weights[1])}, limits))
    assert items.solved <= 40


@pytest.mark.parametrize("seed", range(3))
def test_no_small_change_of_three_prices_raises_the_bound(seed: int) -> None:
    items = Items(seed)
    limits = {1: 0.45 * items.whole(1), 2: 0.3 * items.whole(2), 3: 0.35 * items.whole(3)}
    found = find_prices(items.solve, Goal(0, limits))
    assert items.solved <= 150
    prices = {number: float(found.weights[number]) for number in limits}
    assert found.bound == pytest.approx(items.bound(prices, limits))
    for number in limits:
        for factor in (0.9, 0.99, 1.01, 1.1):
            assert items.bound({**prices, number: factor * prices[number]}, limits) <= found.bound + 1e-9
    # A limit that is no limit has no price.
    free = find_prices(items.solve, Goal(0, {**limits, 2: 2 * items.whole(2)}))
    assert free.weights[2] == 0.0
    assert free.bound < found.bound


def test_limits_that_no_mixture_meets_have_an_infinite_bound() -> None:
    items = Items(0)
    items.values[..., 1:] += 1e6
    least = float(items.values[:, :, 1].min(axis=1).sum())
    found = find_prices(items.solve, Goal(0, {1: 0.8 * least}))
    assert found.bound == np.inf
    assert found.excess == pytest.approx(0.25, rel=1e-6)


def test_limits_that_are_met_anyway_have_no_prices() -> None:
    items = Items(0)
    found = find_prices(items.solve, Goal(0, {1: 2 * items.whole(1)}))
    assert found.bound == pytest.approx(float(items.values[..., 0].min(axis=1).sum()))
    assert not found.weights[1:].any()
    assert items.solved == 1
