"""The map in place of dropped parts is the least-squares solution, and its predicted loss is that of other tokens."""

import numpy as np
import pytest
import torch
from torch import Tensor

from refold.calibration.replacement import MapSums, predict_replacement, token_weights


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def halves_of(before: Tensor, target: Tensor, weights: Tensor | None = None, is_diagonal: bool = False) -> MapSums:
    sums = MapSums(before.shape[1], is_diagonal)
    for half in range(2):
        sums.add(half, before[half::2], target[half::2], None if weights is None else weights[half::2])
    return sums


def test_the_map_is_the_weighted_ridge_regression_of_numpy() -> None:
    before = draw(400, 8, seed=0)
    target = before @ draw(8, 8, seed=1) + 0.5 * draw(400, 8, seed=2)
    weights = draw(400, seed=3).exp()
    found = halves_of(before, target, weights).fit()
    m, d = before.double().numpy(), target.double().numpy()
    root = weights.double().numpy()[:, None] ** 0.5
    ridge = found.ridge * np.trace((m * root).T @ (m * root)) / 8
    rows = np.concatenate([m * root, np.eye(8) * ridge**0.5])
    expected = np.linalg.lstsq(rows, np.concatenate([d * root, np.zeros((8, 8))]), rcond=None)[0].T
    assert np.allclose(found.matrix.numpy() - np.eye(8), expected, atol=1e-4)
    unweighted = halves_of(before, target).fit()
    assert not np.allclose(unweighted.matrix.numpy() - np.eye(8), expected, atol=1e-3)


def test_a_diagonal_map_fits_each_channel_alone() -> None:
    before, scale = draw(300, 6, seed=4), draw(6, seed=5)
    found = halves_of(before, before * scale, is_diagonal=True).fit()
    assert found.matrix.shape == (6,)
    assert torch.allclose(found.matrix, 1 + scale, atol=1e-3)
    assert found.kept == pytest.approx(1, abs=1e-4)


def test_an_update_that_the_part_before_cannot_tell_leaves_the_identity() -> None:
    # Few tokens: a fit without the check on halves would seem to explain most of the target.
    found = halves_of(draw(24, 16, seed=6), draw(24, 16, seed=7)).fit()
    assert found.kept < 0.05
    linear = draw(24, 16, seed=6)
    assert halves_of(linear, 3 * linear).fit().kept > 0.3


def test_nothing_to_restore_leaves_the_identity() -> None:
    found = halves_of(draw(20, 4, seed=8), torch.zeros(20, 4)).fit()
    assert torch.equal(found.matrix, torch.eye(4))
    assert (found.kept, found.ridge) == (0.0, 0.0)


def test_the_predicted_loss_is_that_of_tokens_outside_of_the_fit() -> None:
    before, noise = draw(512, 8, seed=9), draw(512, 8, seed=10)
    update = before @ draw(8, 8, seed=11) + 0.3 * noise
    gradients, stream = draw(512, 8, seed=12), draw(512, 8, seed=13) * 10
    sequences = torch.arange(512) // 64
    found = predict_replacement(before, stream, update, gradients, sequences)
    assert found.dropped == pytest.approx(float((gradients * update).sum(-1).square().mean() / 2), rel=1e-5)
    # A perfect map would leave the noise alone.
    least = float((gradients * 0.3 * noise).sum(-1).square().mean() / 2)
    assert least < found.replaced < 1.15 * least
    assert found.kept == pytest.approx(1 - 0.09 * 8 / float(update.square().sum(-1).mean()), abs=0.03)


def test_few_tokens_do_not_flatter_the_map() -> None:
    before, update, gradients, stream = (draw(32, 24, seed=seed) for seed in range(20, 24))
    found = predict_replacement(before, stream, update, gradients, torch.arange(32) // 4)
    # Nothing links the two updates. A map fitted to all 32 tokens would explain most of them in its own sample.
    sums = MapSums(24)
    sums.add(0, before, update)
    sums.add(1, before, update)
    flattered = sums.fit()
    assert flattered.kept > 0.5
    assert found.replaced > 0.9 * found.dropped


def test_one_sequence_is_halved_by_place() -> None:
    before = draw(64, 4, seed=30)
    found = predict_replacement(before, before, -0.5 * before, before, torch.zeros(64, dtype=torch.long))
    assert found.replaced < 1e-4 * found.dropped


def test_a_token_with_a_large_stream_counts_less() -> None:
    stream = torch.ones(3, 4) * torch.tensor([[1.0], [2.0], [100.0]])
    assert torch.allclose(token_weights(stream), torch.tensor([1.0, 0.25, 1e-4]), rtol=1e-4)
