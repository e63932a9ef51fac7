"""Weights fitted to outputs of the source, against least squares on the tokens."""

import pytest
import torch
from torch import Tensor

from refold.calibration import weighting as targets
from refold.calibration.weighting import aimed_weight, drift_between

ROWS, COLUMNS = 5, 8


def streams(tokens: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of a linear in the source, and those in a folded model: slightly rotated, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(2, tokens // 2, COLUMNS, generator=generator)
    turn = torch.eye(COLUMNS) + 0.3 * torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(9))
    return source, source @ turn + noise * torch.randn(source.shape, generator=generator)


WEIGHT = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(7))


def test_the_correction_is_the_least_squares_one(monkeypatch):
    monkeypatch.setattr(targets, "INPUT_RIDGE", 0.0)
    source, folded = streams(60, noise=0.5)
    found = WEIGHT + drift_between(source, folded).correction(WEIGHT)
    x, y = folded.flatten(0, 1).double(), source.flatten(0, 1).double() @ WEIGHT.double().T
    expected = torch.linalg.lstsq(x, y).solution.T
    assert torch.allclose(found, expected, atol=1e-4)


def test_drifts_add_up_over_tokens():
    source, folded = streams(60, noise=0.5)
    whole = drift_between(source, folded)
    parts = drift_between(source[:1], folded[:1]) + drift_between(source[1:], folded[1:])
    assert whole.tokens == parts.tokens == 60
    assert torch.allclose(whole.inputs, parts.inputs, atol=1e-4)
    assert torch.allclose(whole.drift, parts.drift, atol=1e-4)


def test_the_ridge_keeps_what_the_text_does_not_show():
    source, folded = streams(60, noise=0.5)
    folded[..., -1] = source[..., -1] = 0
    moved = drift_between(source, folded).correction(WEIGHT)
    assert moved[:, -1].abs().max() < 1e-6
    assert moved[:, 0].abs().max() > 0.05


def halves(tokens: int, noise: float) -> tuple[targets.Drift, targets.Drift]:
    return drift_between(*streams(tokens, noise, 1)), drift_between(*streams(tokens, noise, 2))


def test_much_text_is_corrected_by_in_full_and_little_in_part():
    source, folded = streams(4000, noise=0.5, seed=3)

    def lost(weight: Tensor) -> float:
        return float((source @ WEIGHT.T - folded @ weight.T).square().mean())

    much, little = aimed_weight(WEIGHT, halves(4000, 0.5)), aimed_weight(WEIGHT, halves(16, 0.5))
    given = halves(4000, 0.5)
    whole = WEIGHT + (given[0] + given[1]).correction(WEIGHT)
    assert torch.allclose(much, whole.float(), atol=0.02)
    assert lost(much) < 0.5 * lost(WEIGHT)
    given = halves(16, 0.5)
    assert lost(little) < lost((WEIGHT + (given[0] + given[1]).correction(WEIGHT)).float())


def test_inputs_that_are_the_sources_leave_the_weight_bit_for_bit():
    source, _ = streams(60, noise=0.5)
    same = drift_between(source[:1], source[:1]), drift_between(source[1:], source[1:])
    assert torch.equal(aimed_weight(WEIGHT, same), WEIGHT)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_what_does_not_hold_on_the_other_half_is_not_done(scale):
    source, folded = streams(60, noise=0.5)
    drift = drift_between(source, folded)
    # The other half says the opposite.
    opposite = targets.Drift(drift.inputs, -scale * drift.drift, drift.tokens)
    assert torch.equal(aimed_weight(WEIGHT, (drift, opposite)), WEIGHT)
