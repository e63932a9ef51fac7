"""The summary line of a run."""

import pytest

from refold.studies.run import describe_loss, describe_size


@pytest.mark.parametrize(
    ("ratio", "says"), [(0.52, "48% smaller"), (1.0, "the same size"), (1.12, "12% larger"), (0.997, "the same size")]
)
def test_sizes_are_told_as_a_change(ratio: float, says: str) -> None:
    assert describe_size(ratio) == says


@pytest.mark.parametrize(
    ("difference", "error", "says"),
    [(0.041, None, "+0.041"), (0.041, 0.002, "+0.041"), (0.003, 0.002, "+0.003 ± 0.002"), (-0.5, 0.1, "-0.500")],
)
def test_an_error_is_told_where_it_matters(difference: float, error: float | None, says: str) -> None:
    assert describe_loss(difference, error) == says
