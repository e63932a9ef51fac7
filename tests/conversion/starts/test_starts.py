"""Starts against the definitions they stand for, by brute force."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from refold.conversion.starts.group import Fitted, LinearGroup, Member
from refold.conversion.starts.joint import fit_joint
from refold.conversion.starts.registry import STARTS
from refold.conversion.starts.svd import fit_svd


def weights(count: int, rows: int = 14, columns: int = 10) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(rows, columns, generator=generator) for _ in range(count)]


def group(given: list[Tensor], *ranks: int, sources: list[Tensor] | None = None) -> LinearGroup:
    members = {at: Member(weight, rank) for at, (weight, rank) in enumerate(zip(given, ranks, strict=True))}
    return LinearGroup(tuple(sources or given), members, seed=1)


def corrections(found: Fitted) -> dict[int, Tensor]:
    return {depth: b @ a for depth, (a, b) in found.pairs.items()}


def loss(given: list[Tensor], found: Fitted) -> float:
    added = corrections(found)
    stored = found.stored.weight
    zero = torch.zeros_like(stored)
    return sum(
        float((weight - stored - added.get(at, zero)).double().square().sum()) for at, weight in enumerate(given)
    )


def best(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("mode", ["auto", "exact"])
@pytest.mark.parametrize("count", [2, 3])
def test_svd_is_the_best_correction_of_each_residual(count, mode):
    given = weights(count)
    found = fit_svd(group(given, *[3] * count), mode)
    mean = sum(given[1:], given[0]) / count
    assert torch.allclose(found.stored.weight, mean, atol=1e-6)
    for depth, correction in corrections(found).items():
        residual = given[depth] - mean
        assert torch.allclose(correction, best(residual, 3), atol=1e-4)
        a, b = found.pairs[depth]
        assert a.shape == (3, 10)
        assert b.shape == (14, 3)
        # A holds orthonormal rows, B the singular values.
        assert torch.allclose(a @ a.T, torch.eye(3), atol=1e-5)
        share = float(best(residual, 3).square().sum() / residual.square().sum())
        assert found.kept[depth] == pytest.approx(share, abs=1e-4)


def test_two_loops_with_different_ranks_share_one_decomposition():
    given = weights(2)
    found = fit_svd(group(given, 5, 2), "exact")
    residual = (given[0] - given[1]) / 2
    assert torch.allclose(corrections(found)[0], best(residual, 5), atol=1e-4)
    assert torch.allclose(corrections(found)[1], -best(residual, 2), atol=1e-4)


def test_svd_corrects_a_stored_weight_that_is_one_of_its_layers():
    given = weights(2)
    found = fit_svd(group(given, 4, 4, sources=given[:1]), "exact")
    assert torch.equal(found.stored.weight, given[0])
    assert torch.allclose(corrections(found)[1], best(given[1] - given[0], 4), atol=1e-4)
    a, b = found.pairs[0]
    assert a.std() > 0.1
    assert not b.any()
    assert found.kept[0] == 1


@pytest.mark.parametrize("start", STARTS)
def test_a_residual_of_zero_gets_a_trainable_pair_that_adds_nothing(start):
    same = weights(1) * 2
    found = STARTS[start](group(same, 3, 3), "auto")
    assert torch.allclose(found.stored.weight, same[0], atol=1e-6)
    for a, b in found.pairs.values():
        assert a.std() > 0.1
        assert not b.any()
    assert not torch.equal(found.pairs[0][0], found.pairs[1][0])


def test_the_zero_start_adds_nothing():
    given = weights(3)
    found = STARTS["zero"](group(given, 2, 0, 4), "auto")
    assert found.pairs.keys() == {0, 2}
    assert not any(b.any() for _, b in found.pairs.values())
    assert torch.allclose(found.stored.weight, sum(given[1:], given[0]) / 3, atol=1e-6)


def test_joint_at_a_rank_is_the_papers_start_at_twice_that_rank():
    given = weights(2)
    joint, paper = fit_joint(group(given, 3, 3), "exact"), fit_svd(group(given, 6, 6), "exact")
    assert loss(given, joint) == pytest.approx(loss(given, paper), rel=1e-4)
    assert loss(given, joint) < 0.8 * loss(given, fit_svd(group(given, 3, 3), "exact"))
    error = [given[at] - joint.stored.weight - joint_part for at, joint_part in corrections(joint).items()]
    # What is left of both is D without its six leading directions, halved between them.
    difference = given[0] - given[1]
    left = (difference - best(difference, 6)) / 2
    assert torch.allclose(error[0], left, atol=1e-4)
    assert torch.allclose(error[1], -left, atol=1e-4)


@pytest.mark.parametrize(("first", "second"), [(1, 5), (4, 0), (0, 2), (10, 10), (8, 6)])
def test_joint_of_two_is_the_best_there_is_at_unequal_ranks(first, second):
    given = weights(2)
    found = fit_joint(group(given, first, second), "exact")
    difference = given[0] - given[1]
    singular = torch.linalg.svdvals(difference)[first + second :]
    assert loss(given, found) == pytest.approx(float(singular.double().square().sum()) / 2, rel=1e-3, abs=1e-6)
    assert {depth: a.shape[0] for depth, (a, _) in found.pairs.items()} == {
        depth: rank for depth, rank in ((0, first), (1, second)) if rank
    }


@pytest.mark.parametrize("count", [3, 4])
def test_alternation_never_makes_it_worse(monkeypatch, count):
    given = weights(count)
    losses = []
    for rounds in range(1, 8):
        monkeypatch.setattr("refold.conversion.starts.joint.ROUNDS", rounds)
        losses.append(loss(given, fit_joint(group(given, *[3] * count), "exact")))
    assert losses[0] < loss(given, fit_svd(group(given, *[3] * count), "exact"))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses))


def test_joint_at_full_rank_loses_nothing():
    for count in (2, 3):
        given = weights(count)
        assert loss(given, fit_joint(group(given, *[10] * count), "auto")) < 1e-6


def test_joint_says_what_each_pair_holds_of_its_residual():
    given = weights(3)
    found = fit_joint(group(given, 3, 0, 3), "exact")
    for depth, correction in corrections(found).items():
        residual = given[depth] - found.stored.weight
        lost = (residual - correction).square().sum() / residual.square().sum()
        assert found.kept[depth] == pytest.approx(float(1 - lost), abs=1e-4)


def test_joint_without_pairs_stores_the_mean():
    given = weights(2)
    found = fit_joint(group(given, 0, 0), "auto")
    assert torch.allclose(found.stored.weight, (given[0] + given[1]) / 2)
    assert not found.pairs


@pytest.mark.parametrize("start", STARTS)
def test_the_same_group_gives_the_same_bits(start):
    given = weights(3)
    one, other = (STARTS[start](group(given, 3, 3, 3), "auto") for _ in range(2))
    assert torch.equal(one.stored.weight, other.stored.weight)
    for depth in one.pairs:
        assert all(torch.equal(mine, its) for mine, its in zip(one.pairs[depth], other.pairs[depth], strict=True))
