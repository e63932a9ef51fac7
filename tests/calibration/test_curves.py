"""Weightings of a stored linear that one depth or several use."""

import pytest
import torch

from refold.calibration.curves import GroupWeightings
from refold.calibration.weighting import Weighting


def moment(size: int, seed: int) -> torch.Tensor:
    rows = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.T @ rows / len(rows)


def test_a_linear_of_one_depth_is_its_own_mean_and_is_weighted_once() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    inputs, outputs = moment(6, 1), moment(4, 2)
    weightings = GroupWeightings({3: inputs}, {3: outputs})
    assert weightings.mean({3: weight}) is weight
    # The factors of large moments take long.
    assert weightings.of(3) is weightings.of_all()
    expected = torch.einsum("oi,ij,pj,op->", weight.double(), inputs, weight.double(), outputs)
    assert weightings.of(3).energy(weight) == pytest.approx(float(expected), rel=1e-5)


def test_several_depths_are_weighted_apart_and_together() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {depth: torch.randn(4, 6, generator=generator) for depth in (1, 5)}
    inputs, outputs = {1: moment(6, 1), 5: moment(6, 2)}, {1: moment(4, 3), 5: moment(4, 4)}
    weightings = GroupWeightings(inputs, outputs)
    mean = weightings.mean(weights)
    # The mean has no error that any change of it would make smaller: the gradient of the summed error is zero.
    slope = sum(((mean - weights[depth]).double() @ inputs[depth] for depth in weights), torch.zeros(4, 6).double())
    assert slope.abs().max() < 1e-5
    change = weights[1] - weights[5]
    for depth in weights:
        alone = Weighting(inputs[depth], outputs[depth]).energy(change)
        assert weightings.of(depth).energy(change) == pytest.approx(alone)
    summed = Weighting(inputs[1] + inputs[5], (outputs[1] + outputs[5]) / 2).energy(change)
    assert weightings.of_all().energy(change) == pytest.approx(summed)
