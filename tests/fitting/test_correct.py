import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refold.fitting.correct import Seen, fit_scales


def test_factors_of_classes_that_candidates_tell_apart_are_found() -> None:
    seen = [Seen({"bits": 0.04}, 0.08), Seen({"bits": 0.04, "drop": 0.1}, 0.08 + 0.3), Seen({"drop": 0.2}, 0.6)]
    found = fit_scales(seen)
    assert found["bits"] == pytest.approx(2, rel=0.15)
    assert found["drop"] == pytest.approx(3, rel=0.15)


def test_one_candidate_moves_its_largest_class_most() -> None:
    found = fit_scales([Seen({"bits": 0.01, "rank": 0.1}, 0.33)])
    assert found["rank"] > found["bits"] > 1
    assert 0.01 * found["bits"] + 0.1 * found["rank"] == pytest.approx(0.33, rel=0.15)


def test_a_class_that_no_candidate_has_takes_the_common_factor() -> None:
    found = fit_scales([Seen({"bits": 0.1, "width": 0.0}, 0.3)], ["width", "rank"])
    assert found["width"] == found["rank"]
    assert found["bits"] > found["width"] > 2


def test_losses_below_the_noise_leave_the_factors() -> None:
    (factor,) = fit_scales([Seen({"bits": 1e-5}, -1e-3)]).values()
    assert factor == pytest.approx(1, abs=0.05)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(-0.1, 5)), min_size=1, max_size=6))
def test_factors_are_positive_and_finite_and_no_worse_than_none(rows: list[tuple[float, float, float]]) -> None:
    seen = [Seen({"bits": one, "rank": two}, measured) for one, two, measured in rows]
    found = fit_scales(seen)
    assert all(factor > 0 and math.isfinite(factor) for factor in found.values())

    def error(scales: dict[str, float]) -> float:
        sums = [sum(loss * scales.get(name, 1) for name, loss in each.predicted.items()) for each in seen]
        return sum(
            math.log((total + 2e-3) / (max(each.measured, 0) + 2e-3)) ** 2
            for total, each in zip(sums, seen, strict=True)
        )

    assert error(found) <= error({}) + 1e-9
