"""Initialisations against their definitions by brute force."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from refold.calibration.curves import GroupWeightings
from refold.conversion.starts.group import Fitted, LinearGroup, Member
from refold.conversion.starts.joint import _alternate, fit_joint
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


def metric_of(inputs: Mapping[int, Tensor | None], outputs: Tensor | None) -> GroupWeightings:
    return GroupWeightings(inputs, {} if outputs is None else dict.fromkeys(inputs, outputs))


def moment(size: int, seed: int) -> Tensor:
    drawn = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = (
        drawn
        * torch.logspace(0, -1, size, dtype=torch.float64)[
            torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        ]
    )
    return drawn.T @ drawn / len(drawn) + 1e-3 * torch.eye(size, dtype=torch.float64)


def weigh(given: LinearGroup, metric: GroupWeightings | None, stored_rank: int | None = None) -> LinearGroup:
    return replace(given, weightings=metric, stored_rank=stored_rank)


def weighted_loss(given: list[Tensor], stored: Tensor, added: Mapping[int, Tensor], metric: GroupWeightings) -> float:
    outputs = torch.eye(14, dtype=torch.float64) if metric.outputs is None else metric.outputs
    total = 0.0
    for at, weight in enumerate(given):
        error = (weight - stored - added.get(at, torch.zeros_like(stored))).double()
        inputs = metric.inputs[at]
        assert inputs is not None
        total += float(torch.trace(outputs @ error @ inputs @ error.T))
    return total


METRIC = metric_of({0: moment(10, 1), 1: moment(10, 2)}, moment(14, 3))
INPUTS_ALONE = metric_of({0: moment(10, 1), 1: moment(10, 2)}, None)


@pytest.mark.parametrize("metric", [METRIC, INPUTS_ALONE], ids=["fisher", "activations"])
@pytest.mark.parametrize(("first", "second"), [(3, 3), (1, 5), (4, 0), (0, 2)])
def test_weighted_joint_of_two_is_the_best_there_is(monkeypatch, metric, first, second):
    given = weights(2)
    task = weigh(group(given, first, second), metric)
    found = fit_joint(task, "exact")
    lost = weighted_loss(given, found.stored.weight, corrections(found), metric)
    # Half of D's tail where nothing is weighed; here the tail of D in the metric the stored weight leaves.
    difference = given[0] - given[1]
    tail = metric.of_difference(difference).spectrum(difference)[first + second :]
    assert lost == pytest.approx(float(tail.sum()), rel=1e-3)
    plain = fit_joint(group(given, first, second), "exact")
    assert lost < 0.95 * weighted_loss(given, plain.stored.weight, corrections(plain), metric)
    monkeypatch.setattr("refold.conversion.starts.joint.ROUNDS", 30)
    stored, alternated = _alternate(task, dict(task.members), "exact")
    parts = {depth: each.matrix() for depth, each in alternated.items()}
    assert lost <= weighted_loss(given, stored.weight, parts, metric) * (1 + 1e-5)
    generator = torch.Generator().manual_seed(4)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(10):
            moved = found.stored.weight + size * torch.randn(14, 10, generator=generator)
            assert weighted_loss(given, moved, corrections(found), metric) > lost * (1 - 1e-6)
            pairs = {
                depth: (b + size * torch.randn(b.shape, generator=generator))
                @ (a + size * torch.randn(a.shape, generator=generator))
                for depth, (a, b) in found.pairs.items()
            }
            assert weighted_loss(given, moved, pairs, metric) > lost * (1 - 1e-6)
            assert weighted_loss(given, found.stored.weight, pairs, metric) > lost * (1 - 1e-6)


@pytest.mark.parametrize("start", ["svd", "joint"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("stored_rank", [None, 0, 4])
def test_moments_of_one_change_nothing(start, count, stored_rank):
    given = weights(count)
    ranks = [3] * count
    ones = metric_of(
        dict.fromkeys(range(count), torch.eye(10, dtype=torch.float64)), torch.eye(14, dtype=torch.float64)
    )
    plain = STARTS[start](weigh(group(given, *ranks), None, stored_rank), "exact")
    found = STARTS[start](weigh(group(given, *ranks), ones, stored_rank), "exact")
    # Neighbouring singular values of D, dealt to different pairs, mix in rounding.
    assert torch.allclose(found.stored.weight, plain.stored.weight, atol=3e-5)
    for depth, added in corrections(plain).items():
        assert torch.allclose(corrections(found)[depth], added, atol=3e-5)
        assert found.kept[depth] == pytest.approx(plain.kept[depth], abs=1e-5)


def test_moments_of_the_wrong_layers_do_worse():
    given = weights(2)
    swapped = metric_of({0: METRIC.inputs[1], 1: METRIC.inputs[0]}, METRIC.outputs)
    for start in ("svd", "joint"):
        lost = {}
        for name, metric in (("right", METRIC), ("wrong", swapped)):
            found = STARTS[start](weigh(group(given, 2, 2), metric), "exact")
            lost[name] = weighted_loss(given, found.stored.weight, corrections(found), METRIC)
        assert lost["right"] < 0.97 * lost["wrong"]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("metric", [None, METRIC], ids=["plain", "fisher"])
def test_what_is_stored_has_the_rank_asked_for(start, metric):
    given = weights(2)
    whole = STARTS[start](weigh(group(given, 3, 2), metric), "exact")
    assert whole.stored.factors is None
    nothing = STARTS[start](weigh(group(given, 3, 2), metric, 0), "exact")
    assert nothing.stored.factors == ()
    assert not nothing.stored.weight.any()
    some = STARTS[start](weigh(group(given, 3, 2), metric, 4), "exact")
    assert some.stored.factors
    a, b = some.stored.factors
    assert (a.shape, b.shape) == ((4, 10), (14, 4))
    assert torch.allclose(b @ a, some.stored.weight, atol=1e-5)
    if start == "zero":
        return
    # With nothing stored, each pair is its weight's own truncation.
    for depth, added in corrections(nothing).items():
        alone = weigh(group(given, 3, 2), metric).weighting(depth).truncate(given[depth], (3, 2)[depth], "exact", 0)
        assert torch.allclose(added, alone.matrix(), atol=1e-4)
    metric = metric or metric_of(dict.fromkeys((0, 1), torch.eye(10, dtype=torch.float64)), None)
    losses = [weighted_loss(given, each.stored.weight, corrections(each), metric) for each in (whole, some, nothing)]
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("start", ["svd", "joint"])
def test_a_factored_weight_of_one_layer_is_its_truncation(start):
    given = weights(1)
    metric = metric_of({0: METRIC.inputs[0]}, METRIC.outputs)
    found = STARTS[start](weigh(group(given, 0), metric, 4), "exact")
    assert torch.allclose(found.stored.weight, metric.of(0).truncate(given[0], 4, "exact", 0).matrix(), atol=1e-4)


def half(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


@pytest.mark.parametrize("init", ["svd", "joint"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("stored_rank", [None, 5])
def test_full_rank_pairs_correct_the_stored_weight_as_it_is_rounded(init, count, stored_rank):
    given = [half(weight) for weight in weights(count)]
    made = replace(group(given, *[10] * count), stored_rank=stored_rank, dtype=torch.bfloat16)
    errors = []
    for each in (made, replace(made, dtype=torch.float32)):
        found = STARTS[init](each, "exact")
        stored = half(found.stored.weight)
        if found.stored.factors:
            a, b = (half(factor) for factor in found.stored.factors)
            stored = b @ a
        # The pairs stay in float32, so they must correct the rounding of the stored weight.
        errors.append(
            max(float((w - stored - c).abs().max()) for w, c in zip(given, corrections(found).values(), strict=True))
        )
    assert errors[0] < 2e-5
    assert errors[1] > 1e-3


def test_rounding_that_is_lost_in_the_error_costs_no_second_fit(monkeypatch):
    given = [half(weight) for weight in weights(2)]
    made = replace(group(given, 2, 2), dtype=torch.bfloat16)
    wide = fit_joint(replace(made, dtype=torch.float32), "exact")
    found = fit_joint(made, "exact")
    assert torch.equal(found.stored.weight, half(wide.stored.weight))
    for depth, correction in corrections(found).items():
        assert torch.equal(correction, corrections(wide)[depth])
