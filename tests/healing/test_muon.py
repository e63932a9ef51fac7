import copy
from functools import partial

import pytest
import torch
from torch import nn

from refold.healing import muon
from refold.healing.muon import Muon, orthogonalise

SETTINGS = {"lr": 0.02, "weight_decay": 0.1}
Torchs = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")


def _weights():
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 24), (24, 60), (60, 24), (24, 24), (4, 24), (24, 60)]
    return nn.ParameterList(nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes)


def _train(make, weights, steps=5):
    optimizer = make(weights.parameters(), **SETTINGS)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for index, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape, generator=generator)
            if index == 3 and step == 2:
                weight.grad = None
        optimizer.step()
    return optimizer


def test_in_bfloat16_it_is_torchs_muon(monkeypatch):
    monkeypatch.setattr(muon, "has_fast_bfloat16", lambda device: True)
    ours, theirs = _weights(), _weights()
    mine, reference = _train(Muon, ours), _train(Torchs, theirs)
    for weight, expected, start in zip(ours, theirs, _weights(), strict=True):
        moved = (expected - start).norm()
        assert (weight - expected).norm() <= 0.01 * moved
        momenta = mine.state[weight]["momentum_buffer"], reference.state[expected]["momentum_buffer"]
        assert torch.equal(*momenta)


def test_in_float32_it_is_torchs_muon_but_for_the_rounding(monkeypatch):
    monkeypatch.setattr(muon, "has_fast_bfloat16", lambda device: False)
    ours, theirs = _weights(), _weights()
    _train(Muon, ours)
    _train(Torchs, theirs)
    for weight, expected, start in zip(ours, theirs, _weights(), strict=True):
        assert (weight - expected).norm() <= 0.03 * (expected - start).norm()


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (2, 16, 16)])
def test_directions_stay_and_singular_values_come_near_one(shape):
    generator = torch.Generator().manual_seed(2)
    matrices = torch.randn(shape, generator=generator)
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    keep = values / values[:, :1] > 0.05
    made = left.mT @ orthogonalise(matrices).double() @ right.mT
    diagonal = made.diagonal(dim1=-2, dim2=-1)
    assert (made - torch.diag_embed(diagonal)).abs().max() < 0.05
    assert diagonal[keep].min() > 0.6
    assert diagonal[keep].max() < 1.3


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 6)).float(), torch.zeros(1, 4, 6))


def test_cutting_stacks_changes_nothing_but_rounding(monkeypatch):
    whole, cut = _weights(), _weights()
    _train(Muon, whole)
    monkeypatch.setattr(muon, "LARGEST_STACK", 1)
    _train(Muon, cut)
    for weight, expected in zip(cut, whole, strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)


def test_its_state_goes_through_a_state_dict():
    weights = _weights()
    optimizer = _train(Muon, weights)
    other = copy.deepcopy(weights)
    loaded = Muon(other.parameters(), **SETTINGS)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for weight, twin in zip(weights, other, strict=True):
        weight.grad = torch.ones_like(weight)
        twin.grad = torch.ones_like(twin)
    optimizer.step()
    loaded.step()
    assert all(torch.equal(*pair) for pair in zip(weights, other, strict=True))
