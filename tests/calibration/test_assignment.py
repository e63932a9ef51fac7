"""The auction against trying all assignments."""

from itertools import permutations

import pytest
import torch

from refold.calibration.frames import assign


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("seed", range(4))
def test_no_assignment_is_better(size, seed):
    scores = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    found = assign(scores)
    assert sorted(found.tolist()) == list(range(size))
    best = max(sum(float(scores[row, column]) for row, column in enumerate(each)) for each in permutations(range(size)))
    assert float(scores[torch.arange(size), found].sum()) >= best - 1e-3 * float(scores.max() - scores.min()) * size


def test_a_planted_order_is_found_whatever_the_scale():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(90, 12, generator=generator)
    order = torch.randperm(90, generator=generator)
    for scale in (1e-6, 1.0, 1e6):
        found = assign(scale * rows @ rows[order].T)
        assert torch.equal(order[found], torch.arange(90))


def test_equal_scores_keep_the_order_and_ties_end():
    assert torch.equal(assign(torch.ones(5, 5)), torch.arange(5))
    tied = torch.tensor([[2.0, 2, 0], [2, 2, 0], [2, 2, 0]])
    found = assign(tied)
    assert sorted(found.tolist()) == [0, 1, 2]
    assert torch.equal(found, assign(tied))
