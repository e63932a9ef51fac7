"""Rounding of two factors."""

import pytest
import torch
from torch import Tensor

from refold.blueprint.integers import SCHEMES
from refold.calibration.integer_factors import balance_factors, refit_second, round_factors
from refold.nn.rounding import round_weight


def factors(rank: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Factors as a truncated SVD gives them, and inputs with few strong directions."""
    generator = torch.Generator().manual_seed(2)
    a = torch.linalg.qr(torch.randn(96, rank, generator=generator)).Q.T.contiguous()
    b = torch.randn(48, rank, generator=generator) * torch.logspace(1, -2, rank)
    mix = torch.randn(96, 96, generator=generator) * torch.logspace(0, -2, 96)
    return a, b, torch.randn(500, 96, generator=generator) @ mix.T


def output_error(found: Tensor, expected: Tensor, x: Tensor) -> float:
    return float((x @ (found - expected).T).square().mean())


@pytest.mark.parametrize("name", ["int8", "int6g128", "int5g64", "int4", "int4z", "int3g64", "int2g64"])
def test_feedback_loses_less_in_both_factors_than_the_nearest_integers(name: str) -> None:
    a, b, x = factors()
    scheme, product = SCHEMES[name], b @ a
    first, second = (each.dequantise() for each in round_factors(a, b, x.T @ x, scheme))
    plain = [round_weight(each, scheme, torch.ones(each.shape[1])).dequantise() for each in (a, b)]
    found = output_error(second @ first, product, x)
    assert found < 0.5 * output_error(plain[1] @ plain[0], product, x)
    # The control: factors rounded by the moment of other inputs.
    wrong = [each.dequantise() for each in round_factors(a, b, torch.eye(96), scheme)]
    assert found < 0.9 * output_error(wrong[1] @ wrong[0], product, x)


def test_balanced_factors_have_the_same_product_and_columns_of_length_1() -> None:
    a, b, _ = factors()
    b[:, 3] = 0
    first, second = balance_factors(a, b)
    torch.testing.assert_close(second @ first, b @ a)
    lengths = torch.linalg.vector_norm(second, dim=0)
    torch.testing.assert_close(lengths, torch.where(torch.arange(32) == 3, 0.0, 1.0))


def test_the_second_factor_takes_back_errors_of_the_first() -> None:
    a, b, x = factors()
    changed = a + 0.05 * torch.randn(a.shape, generator=torch.Generator().manual_seed(3))
    fitted = refit_second(a, changed, b, x.T @ x, bits=16)
    expected = torch.linalg.lstsq((x @ changed.T).double(), (x @ (b @ a).T).double()).solution.T
    assert output_error(fitted @ changed, b @ a, x) < 0.7 * output_error(b @ changed, b @ a, x)
    assert output_error(fitted @ changed, b @ a, x) == pytest.approx(
        output_error(expected.float() @ changed, b @ a, x), rel=0.05
    )


def test_without_inputs_the_second_factor_stays() -> None:
    a, b, _ = factors()
    assert refit_second(a, a + 1, b, torch.zeros(96, 96), bits=4).equal(b)
