"""Rounding with error feedback."""

import itertools

import pytest
import torch
from torch import Tensor

from refold.blueprint.integers import SCHEMES, Scheme
from refold.calibration.feedback import round_with_feedback
from refold.nn.rounding import round_weight

SMALL = Scheme(bits=2, group=3, has_zero_point=True)


def correlated(columns: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight, and inputs with few strong directions."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    return weight, torch.randn(tokens, columns, generator=generator) @ mix.T


def output_error(found: Tensor, weight: Tensor, x: Tensor) -> float:
    return float((x @ (found - weight).T).square().mean())


@pytest.mark.parametrize(("name", "columns"), [("int4", 96), ("int4", 70), ("int4z", 200), ("int8", 70)])
def test_errors_of_outputs_are_much_smaller_than_by_nearest_integers(name: str, columns: int) -> None:
    weight, x = correlated(columns)
    scheme = SCHEMES[name]
    plain = output_error(round_weight(weight, scheme).dequantise(), weight, x)
    found = round_with_feedback(weight, x.T @ x, scheme)
    assert output_error(found.dequantise(), weight, x) < 0.5 * plain
    # The control: feedback by other inputs does not help.
    wrong = round_with_feedback(weight, torch.eye(columns), scheme)
    assert output_error(wrong.dequantise(), weight, x) > 0.5 * plain


def test_integers_lie_in_the_range_and_are_stored_and_read_back() -> None:
    weight, x = correlated(70)
    for scheme in SCHEMES.values():
        rounded = round_with_feedback(weight, x.T @ x, scheme)
        pieces = rounded.store(scheme)
        assert {name: tuple(each.shape) for name, each in pieces.items()} == {
            each.suffix: each.shape for each in scheme.pieces(*weight.shape)
        }
        assert rounded.integers.equal(rounded.integers.round())


def test_without_correlation_it_is_rounding_to_the_nearest() -> None:
    weight, _ = correlated(64)
    rounded = round_with_feedback(weight, torch.eye(64), SCHEMES["int4"])
    assert rounded.integers.equal(round_weight(weight, SCHEMES["int4"], torch.ones(64)).integers)


def test_three_columns_are_near_the_best_of_all_integers() -> None:
    weight, x = correlated(3)
    rounded = round_with_feedback(weight, x.T @ x, SMALL)
    moment = (x.T @ x).double()
    found = best = 0.0
    for row in range(len(weight)):
        scale, zero = rounded.scale[row, 0, 0], rounded.zero_point[row, 0, 0]
        grid = [
            scale * (torch.tensor(each, dtype=torch.float32) - zero) for each in itertools.product(range(4), repeat=3)
        ]
        errors = [(each - weight[row]).double() for each in grid]
        best += min(float(error @ moment @ error) for error in errors)
        error = (rounded.dequantise()[row] - weight[row]).double()
        found += float(error @ moment @ error)
    plain = (round_weight(weight, SMALL).dequantise() - weight).double()
    assert best <= found < float((plain @ moment * plain).sum())


def test_inputs_that_never_occur_are_rounded_to_the_nearest() -> None:
    weight, x = correlated(64)
    x[:, 10:] = 0
    rounded = round_with_feedback(weight, x.T @ x, SCHEMES["int8"])
    assert bool(rounded.dequantise().isfinite().all())
    silent = round_with_feedback(weight, torch.zeros(64, 64), SCHEMES["int8"])
    assert silent.integers.equal(round_weight(weight, SCHEMES["int8"], torch.ones(64)).integers)
