"""Bounds over documents, and the choice of thresholds by them."""

import math

import numpy as np
import pytest

from refold.engine.risk import documents_needed, search_in_order, upper_bound

TOLERANCE, DELTA = 0.05, 0.1
RUNS, DOCUMENTS, TOKENS = 400, 200, 100


def correlated(generator: np.random.Generator, mean: float) -> np.ndarray:
    """Shares of wrong tokens of documents: in a few documents most tokens are wrong together."""
    rates = np.where(generator.random(DOCUMENTS) < mean / 0.8, 0.8, 0.0)
    return generator.binomial(TOKENS, rates) / TOKENS


def by_tokens(losses: np.ndarray, delta: float) -> float:
    """The negative control: the normal bound as if tokens were independent."""
    mean, count = losses.mean(), TOKENS * len(losses)
    return mean + 1.2816 * math.sqrt(mean * (1 - mean) / count)


@pytest.mark.parametrize(("bound", "covers"), [(upper_bound, True), (by_tokens, False)])
def test_the_bound_over_documents_covers_and_one_over_tokens_does_not(bound, covers):
    generator = np.random.default_rng(0)
    missed = np.mean([bound(correlated(generator, TOLERANCE), DELTA) < TOLERANCE for _ in range(RUNS)])
    # Three standard errors of a share of 0.1 among the runs.
    assert (missed <= DELTA + 0.045) == covers, missed


def test_the_bound_comes_near_the_mean_where_documents_are_many_and_alike():
    losses = np.random.default_rng(1).beta(1, 99, size=3000)
    assert 0.0095 < losses.mean() < upper_bound(losses, 0.05) < 0.012


@pytest.mark.parametrize("losses", [[], [1.0], [1.0] * 50, [0.0]])
def test_nothing_is_promised_for_no_documents_or_for_bad_ones(losses):
    assert upper_bound(np.array(losses), 0.05) > 0.9


@pytest.mark.parametrize(("tolerance", "delta"), [(0.01, 0.05), (0.05, 0.05), (0.005, 0.025), (0.5, 0.1)])
def test_the_number_of_documents_needed_is_the_least_and_near_the_rule_of_thumb(tolerance, delta):
    needed = documents_needed(tolerance, delta)
    assert upper_bound(np.zeros(needed), delta) <= tolerance < upper_bound(np.zeros(needed - 1), delta)
    assert needed / (math.log(1 / delta) / tolerance) == pytest.approx(1.1, abs=0.35)


def scores(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and error of tokens by document; errors are rarer where confidence is high, and come together."""
    sure = generator.random((DOCUMENTS, TOKENS))
    hard = generator.random((DOCUMENTS, 1)) < 0.2
    return sure, generator.random((DOCUMENTS, TOKENS)) < np.where(hard, 0.6, 0.05) * (1 - sure)


def true_loss(threshold: float) -> float:
    # The mean over (1 - sure) above a threshold, times the mean of the rates.
    return (0.2 * 0.6 + 0.8 * 0.05) * (1 - threshold) ** 2 / 2


GRID = tuple(np.linspace(0.99, 0.0, 34))


def test_the_chosen_threshold_keeps_the_tolerance_as_often_as_promised():
    generator, broken, found = np.random.default_rng(2), 0, []
    for _ in range(RUNS):
        sure, wrong = scores(generator)

        def losses(threshold: float, sure: np.ndarray = sure, wrong: np.ndarray = wrong) -> np.ndarray:
            return ((sure >= threshold) & wrong).mean(-1)

        passed = search_in_order(GRID, losses, TOLERANCE, DELTA)
        assert passed is not None
        assert passed.bound <= TOLERANCE
        found.append(GRID[passed.place])
        broken += true_loss(found[-1]) > TOLERANCE
    assert broken / RUNS <= DELTA + 0.045
    # The promise is not kept by leaving nobody: the best threshold is 0.209.
    assert 0.209 < np.median(found) < 0.4


def test_choosing_by_the_mean_alone_breaks_the_promise():
    generator, broken = np.random.default_rng(2), 0
    for _ in range(RUNS):
        sure, wrong = scores(generator)
        kept = [each for each in GRID if ((sure >= each) & wrong).mean() <= TOLERANCE]
        broken += true_loss(min(kept)) > TOLERANCE
    assert broken / RUNS > DELTA + 0.045


def test_the_search_stops_at_the_first_failure_and_passes_over_equal_losses():
    bad, good = np.full(400, 0.5), np.zeros(400)
    asked = []

    def losses(threshold: float) -> np.ndarray:
        asked.append(threshold)
        return bad if threshold == 0.5 else good

    passed = search_in_order((0.9, 0.8, 0.5, 0.1), losses, 0.05, 0.05)
    assert passed is not None
    assert (passed.place, asked) == (1, [0.9, 0.8, 0.5])
    assert search_in_order((0.5, 0.1), losses, 0.05, 0.05) is None
