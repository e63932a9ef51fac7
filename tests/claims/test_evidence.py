"""Estimates over seeds and documents against scipy, brute force and simulated experiments."""

import math

import numpy as np
import pytest

from refold.claims.evidence import Samples, combine, estimate, estimate_by_seed, student_quantile


def drawn(rng: np.random.Generator, effect: float, seeds: int = 3, documents: int = 40, noise: float = 0.02) -> Samples:
    """Bits of a difference: an effect for each byte, noise of seeds, and noise of documents."""
    sizes = rng.integers(200, 400, documents)
    of_seeds = rng.normal(0, noise, (seeds, 1))
    return Samples((effect + of_seeds + rng.normal(0, noise, documents)) * sizes, sizes)


def test_quantiles_are_those_of_the_printed_table() -> None:
    printed = {1: 12.706, 2: 4.303, 4: 2.776, 10: 2.228, 30: 2.042, 120: 1.980}
    assert {d: round(student_quantile(0.975, float(d)), 3) for d in printed} == pytest.approx(printed, abs=1e-3)


@pytest.mark.parametrize("degrees", [1, 1.7, 2, 5.5, 30, 49.9, 50, 400, 1e7])
@pytest.mark.parametrize("probability", [0.8, 0.95, 0.975])
def test_quantiles_are_those_of_scipy(degrees: float, probability: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert student_quantile(probability, float(degrees)) == pytest.approx(stats.t.ppf(probability, degrees), rel=3e-5)


def test_by_seed_the_interval_is_that_of_a_t_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = [0.3, 0.1, 0.25, 0.4]
    found = estimate_by_seed(values)
    wanted = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found.interval == pytest.approx((wanted.low, wanted.high), rel=1e-6)


def test_documents_alone_give_the_error_of_a_jackknife() -> None:
    samples = drawn(np.random.default_rng(0), 0.1, seeds=1, documents=200)
    amounts, sizes = samples.amounts[0], samples.sizes
    left_out = (amounts.sum() - amounts) / (sizes.sum() - sizes)
    jackknife = math.sqrt((len(sizes) - 1) * left_out.var())
    found = estimate(samples)
    assert found.error == pytest.approx(jackknife, rel=0.02)
    assert found.degrees == pytest.approx(199)
    assert found.num_seeds == 1


def test_both_sources_of_variance_count() -> None:
    samples = drawn(np.random.default_rng(1), 0.1)
    one_seed = estimate(Samples(samples.amounts.mean(0, keepdims=True), samples.sizes))
    by_seed = estimate_by_seed(samples.by_seed.tolist())
    assert estimate(samples).error == pytest.approx(math.hypot(one_seed.error, by_seed.error))
    assert estimate(samples).value == pytest.approx(one_seed.value)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    found = [estimate(drawn(rng, 0.05)).interval for _ in range(200)]
    covered = np.mean([low <= 0.05 <= high for low, high in found])
    assert 0.92 <= covered <= 0.99
    # Seeds as independent documents would be a mistake: their shared noise would be lost.
    naive = [estimate(Samples(each.amounts.mean(0, keepdims=True), each.sizes)) for each in _many(rng)]
    assert np.mean([each.interval[0] <= 0.05 <= each.interval[1] for each in naive]) < 0.9


def _many(rng: np.random.Generator) -> list[Samples]:
    return [drawn(rng, 0.05) for _ in range(100)]


def test_an_effect_of_the_detectable_size_is_found_with_the_stated_power() -> None:
    rng = np.random.default_rng(3)
    size = float(np.mean([estimate(drawn(rng, 0.0, seeds=8)).detectable for _ in range(50)]))
    power = np.mean([estimate(drawn(rng, size, seeds=8)).interval[0] > 0 for _ in range(200)])
    assert 0.7 <= power <= 0.9
    assert np.mean([estimate(drawn(rng, size / 4, seeds=8)).interval[0] > 0 for _ in range(100)]) < 0.3


def test_a_reading_without_seeds_is_paired_with_every_seed() -> None:
    rng = np.random.default_rng(4)
    trained, given = drawn(rng, 1.0), drawn(rng, 0.4, seeds=1)
    given = Samples(given.amounts, trained.sizes)
    found = combine([(1.0, trained), (-1.0, given)])
    assert found.amounts == pytest.approx(trained.amounts - given.amounts)
    assert found.value == pytest.approx(trained.value - given.value)


def test_readings_of_other_documents_are_refused() -> None:
    rng = np.random.default_rng(5)
    with pytest.raises(AssertionError, match="same documents"):
        combine([(1.0, drawn(rng, 0.0)), (-1.0, drawn(rng, 0.0))])
