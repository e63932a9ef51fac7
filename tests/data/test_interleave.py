from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refold.data.mixture import Interleave
from refold.errors import DataError

WEIGHTS = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@settings(max_examples=40)
@given(weights=WEIGHTS, start=st.integers(0, 10**12))
def test_every_prefix_has_every_share_within_one(weights: list[int], start: int):
    interleave = Interleave(weights)
    assert interleave.shares == tuple(Fraction(weight, sum(weights)) for weight in weights)
    counts = [0] * len(weights)
    for position in range(2 * sum(weights)):
        source, place = interleave.locate(position)
        assert place == counts[source]
        counts[source] += 1
        for share, count in zip(interleave.shares, counts, strict=True):
            assert abs(count - (position + 1) * share) < 1
    for number in range(len(weights)):
        assert counts[number] <= interleave.most(number, 2 * sum(weights))

    # Far on: the same order goes on, and ranks with it.
    source, place = interleave.locate(start)
    assert abs(place - start * interleave.shares[source]) < 1
    again = next(position for position in range(start + 1, start + 10**6) if interleave.locate(position)[0] == source)
    assert interleave.locate(again)[1] == place + 1


def test_weights_count_as_they_are_written():
    assert Interleave([0.7, 0.2, 0.1]).shares == (Fraction(7, 10), Fraction(1, 5), Fraction(1, 10))
    assert Interleave([2, 2]).shares == (Fraction(1, 2), Fraction(1, 2))


def test_weights_without_a_small_common_denominator_are_rounded():
    interleave = Interleave([1 / 3, 0.212311, 0.011])
    total = 1 / 3 + 0.212311 + 0.011
    for share, weight in zip(interleave.shares, (1 / 3, 0.212311, 0.011), strict=True):
        assert abs(float(share) - weight / total) <= 2**-16
    counts = [0, 0, 0]
    for position in range(70_000):
        source, place = interleave.locate(position)
        assert place == counts[source]
        counts[source] += 1
        assert abs(counts[source] - (position + 1) * float(interleave.shares[source])) < 1


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_are_positive_numbers(weight: float):
    with pytest.raises(DataError, match=r"data: weights above 0 are required \(got "):
        Interleave([1, weight])


def test_weights_are_not_too_far_apart():
    with pytest.raises(DataError, match=r"weights of at least 1/65536 of their sum are required \(got 1e-09\)"):
        Interleave([1, 1e-9])
