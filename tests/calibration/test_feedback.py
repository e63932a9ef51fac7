"""Rounding with error feedback."""

import itertools

import pytest
import torch
from torch import Tensor

from refold.blueprint.integers import SCHEMES, Scheme
from refold.calibration import feedback
from refold.calibration.feedback import round_by_schemes, round_with_feedback
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
    for name, share in (("int8", 1.0), ("int4", 0.97)):
        rounded = round_with_feedback(weight, torch.eye(64), SCHEMES[name])
        nearest = round_weight(weight, SCHEMES[name], torch.ones(64))
        # Scales are fitted again below 8 bits, which moves a few integers.
        assert float((rounded.integers == nearest.integers).float().mean()) >= share
        errors = [float((each.dequantise() - weight).square().sum()) for each in (rounded, nearest)]
        assert errors[0] <= errors[1]


@pytest.mark.parametrize("name", ["int4", "int3zg64", "int2g64"])
def test_sweeps_lower_the_error_of_outputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = correlated(96)
    errors = []
    for sweeps in (0, 1, 2, 4):
        monkeypatch.setitem(feedback.SWEEPS, SCHEMES[name].bits, sweeps)
        errors.append(output_error(round_with_feedback(weight, x.T @ x, SCHEMES[name]).dequantise(), weight, x))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.97 * errors[0]


def test_several_schemes_at_once_are_those_one_by_one() -> None:
    weight, x = correlated(70)
    schemes = [SCHEMES[name] for name in ("int8", "int6g64", "int4", "int3zg64", "int2g128")]
    for scheme, found in zip(schemes, round_by_schemes(weight, x.T @ x, schemes), strict=True):
        alone = round_with_feedback(weight, x.T @ x, scheme)
        assert float((found.integers == alone.integers).float().mean()) > 0.97
        together = [output_error(each.dequantise(), weight, x) for each in (found, alone)]
        assert together[0] == pytest.approx(together[1], rel=0.05)


def test_a_group_of_zeros_stays_zero() -> None:
    weight, x = correlated(64)
    weight[:, 32:] = 0
    for name, scheme in SCHEMES.items():
        if scheme.group == 32:
            for found in (
                round_weight(weight, scheme),
                round_with_feedback(weight, torch.diag((x.T @ x).diag()), scheme),
            ):
                assert found.dequantise()[:, 32:].eq(0).all(), name
        assert round_weight(torch.zeros(4, 64), scheme).dequantise().eq(0).all(), name


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
