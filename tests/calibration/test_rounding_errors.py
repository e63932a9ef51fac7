"""Predicted errors of integers and ranks."""

import itertools

import pytest
import torch
from torch import Tensor

from refold.blueprint.integers import FIT_SCHEMES, SCHEMES
from refold.calibration.feedback import round_with_feedback
from refold.calibration.rounding_errors import MatrixErrors, factored_error, rounding_errors, weighted_error
from refold.calibration.weighting import Moments
from refold.nn.rounding import round_weight


def matrix(rows: int = 48, columns: int = 64) -> tuple[Tensor, Moments]:
    """A weight with a falling spectrum, and moments with few strong directions."""
    generator = torch.Generator().manual_seed(1)
    low = torch.randn(rows, columns, generator=generator) * torch.logspace(0, -1.5, columns)
    weight = low @ torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    x = torch.randn(600, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    g = torch.randn(600, rows, generator=generator) * torch.logspace(-2, -1, rows)
    return weight, Moments(x.T @ x / len(x), g.T @ g / len(g))


def test_a_change_costs_the_mean_of_half_its_squared_effect_on_the_loss() -> None:
    weight, moments = matrix(5, 7)
    assert moments.outputs is not None
    found = 0.0
    for first, second in itertools.product(range(5), repeat=2):
        for left, right in itertools.product(range(7), repeat=2):
            product = float(weight[first, left]) * float(weight[second, right])
            found += 0.5 * float(moments.outputs[first, second]) * product * float(moments.inputs[left, right])
    assert weighted_error(weight, moments) == pytest.approx(found, rel=1e-5)
    assert weighted_error(weight, Moments(moments.inputs)) != pytest.approx(found, rel=0.1)


def test_the_error_of_a_scheme_is_that_of_rounding_with_feedback() -> None:
    weight, moments = matrix()
    for name in FIT_SCHEMES:
        rounded = round_with_feedback(weight, moments.inputs, SCHEMES[name]).dequantise()
        found = rounding_errors(weight, moments, SCHEMES[name])
        assert found == pytest.approx(weighted_error(rounded - weight, moments), rel=1e-6)
        plain = round_weight(weight, SCHEMES[name], torch.ones(64)).dequantise()
        assert found < weighted_error(plain - weight, moments)


def test_a_matrix_with_few_rows_gets_exact_errors_of_all_schemes_at_once() -> None:
    weight, moments = matrix()
    found = MatrixErrors(weight, moments).whole(FIT_SCHEMES)
    assert list(found) == list(FIT_SCHEMES)
    for name, error in found.items():
        assert error == pytest.approx(rounding_errors(weight, moments, SCHEMES[name]), rel=0.02)


def test_a_sample_of_rows_estimates_the_error_of_all() -> None:
    weight, moments = matrix(400, 64)
    sampled = MatrixErrors(weight, moments, rows=64).whole(("int4", "int2g64"))
    for name, error in sampled.items():
        assert error == pytest.approx(rounding_errors(weight, moments, SCHEMES[name]), rel=0.15)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (200, 40)])
def test_errors_of_all_ranks_follow_from_one_decomposition(shape: tuple[int, int]) -> None:
    weight, moments = matrix(*shape)
    found = MatrixErrors(weight, moments, rows=96).factored((8, 32, min(shape)), (None, "int8", "int4", "int2g64"))
    for (rank, name), error in found.items():
        expected = factored_error(weight, moments, rank, None if name is None else SCHEMES[name])
        if name is None:
            assert error == pytest.approx(expected, rel=1e-3, abs=1e-6 * weighted_error(weight, moments))
        else:
            assert error == pytest.approx(expected, rel=0.15), (rank, name)


def test_without_gradients_the_error_is_that_of_the_outputs() -> None:
    weight, moments = matrix()
    plain = Moments(moments.inputs)
    found = MatrixErrors(weight, plain)
    assert found.whole(("int4",))["int4"] == pytest.approx(rounding_errors(weight, plain, SCHEMES["int4"]), rel=0.02)
    assert found.factored((16,), ("int4",))[16, "int4"] == pytest.approx(
        factored_error(weight, plain, 16, SCHEMES["int4"]), rel=0.15
    )
