"""A basis shared by several weights, against brute force in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from refold.calibration.curves import GroupWeightings
from refold.conversion.starts import basis as module
from refold.conversion.starts.basis import fit_basis
from refold.conversion.starts.group import FittedBasis, LinearGroup, Member
from refold.conversion.starts.registry import STARTS

ROWS, COLUMNS = 14, 10


def weights(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(count)]


def moment(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    drawn = drawn * torch.logspace(0, -1, size, dtype=torch.float64)[torch.randperm(size, generator=generator)]
    return drawn.T @ drawn / len(drawn)


def group(
    given: list[Tensor], rank: int, inputs: list[Tensor] | None = None, outputs: list[Tensor] | None = None, lora=0
) -> LinearGroup:
    members = {at: Member(weight, lora) for at, weight in enumerate(given)}
    weightings = None
    if inputs is not None:
        weightings = GroupWeightings(dict(enumerate(inputs)), dict(enumerate(outputs or ())))
    return LinearGroup(tuple(given), members, weightings, basis_rank=rank, seed=1)


def lost(task: LinearGroup, computed: dict[int, Tensor]) -> float:
    return sum(
        task.weighting(depth).energy(member.weight - computed[depth].float()) for depth, member in task.members.items()
    )


def computed(found: FittedBasis) -> dict[int, Tensor]:
    return {
        depth: found.weight(depth) + (found.pairs[depth][1] @ found.pairs[depth][0] if found.pairs else 0)
        for depth in found.coefficients
    }


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.T


@pytest.mark.parametrize("mode", ["auto", "exact"])
@pytest.mark.parametrize(("count", "rank"), [(2, 1), (2, 4), (3, 7)])
def test_without_weights_it_is_the_svd_of_the_stacked_matrices(mode, count, rank):
    given = weights(count)
    found = fit_basis(group(given, rank), "svd", mode)
    u, s, vh = torch.linalg.svd(torch.cat(given).double(), full_matrices=False)
    expected = ((u[:, :rank] * s[:rank]) @ vh[:rank]).float()
    assert torch.allclose(torch.cat(list(computed(found).values())), expected, atol=1e-5)
    assert found.a.shape == (rank, COLUMNS)
    assert {tuple(each.shape) for each in found.coefficients.values()} == {(ROWS, rank)}
    assert not found.pairs


@pytest.mark.parametrize("outputs", [None, [moment(ROWS, 3), moment(ROWS, 4)]], ids=["activations", "fisher"])
def test_where_all_see_the_same_inputs_it_is_the_svd_of_the_weighted_stack(outputs):
    given, inputs = weights(2), moment(COLUMNS, 5)
    task = group(given, 4, [inputs, inputs], outputs)
    found = fit_basis(task, "svd", "exact")
    # Symmetric roots here, triangular ones there: the best matrix is the same.
    right = root(inputs)
    left = [torch.eye(ROWS, dtype=torch.float64)] * 2 if outputs is None else [root(each) for each in outputs]
    stacked = torch.cat([turn @ weight.double() @ right for turn, weight in zip(left, given, strict=True)])
    u, s, vh = torch.linalg.svd(stacked, full_matrices=False)
    best = ((u[:, :4] * s[:4]) @ vh[:4]).split(ROWS)
    for depth, mine in computed(found).items():
        expected = torch.linalg.inv(left[depth]) @ best[depth] @ torch.linalg.inv(right)
        assert torch.allclose(mine, expected.float(), atol=1e-4)
    assert lost(task, computed(found)) == pytest.approx(float(s[4:].square().sum()), rel=1e-4)


@pytest.mark.parametrize("count", [2, 3])
def test_moments_of_one_change_nothing(count):
    given = weights(count)
    ones = [torch.eye(COLUMNS, dtype=torch.float64)] * count
    plain, weighed = (fit_basis(group(given, 4, each), "svd", "exact") for each in (None, ones))
    for depth, mine in computed(plain).items():
        assert torch.allclose(mine, computed(weighed)[depth], atol=1e-5)


@pytest.mark.parametrize("with_outputs", [False, True], ids=["activations", "fisher"])
@pytest.mark.parametrize("count", [2, 3])
def test_where_inputs_differ_nothing_near_is_better(monkeypatch, count, with_outputs):
    given, inputs = weights(count), [moment(COLUMNS, seed) for seed in range(count)]
    outputs = [moment(ROWS, 10 + seed) for seed in range(count)] if with_outputs else None
    task = group(given, 4, inputs, outputs)
    losses = []
    for rounds in (0, 1, 4, 400):
        monkeypatch.setattr(module, "ROUNDS", rounds)
        found = fit_basis(task, "svd", "exact")
        losses.append(lost(task, computed(found)))
    # The paper's basis, from the sum of the moments, is where it begins.
    assert losses[0] > losses[1] > losses[2] >= losses[3] * (1 - 1e-6)
    assert losses[3] < 0.95 * losses[0]
    generator = torch.Generator().manual_seed(4)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(10):
            a = found.a + size * torch.randn(4, COLUMNS, generator=generator)
            moved = {
                depth: (b + size * torch.randn(ROWS, 4, generator=generator)) @ a
                for depth, b in found.coefficients.items()
            }
            assert lost(task, moved) > losses[3] * (1 - 1e-5)
    swapped = group(given, 4, inputs[::-1], outputs and outputs[::-1])
    assert lost(task, computed(fit_basis(swapped, "svd", "exact"))) > losses[3] * 1.02


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("weighed", [False, True])
def test_a_basis_of_full_rank_gives_every_matrix_back(init, weighed):
    given = weights(3)
    inputs = [moment(COLUMNS, seed) for seed in range(3)] if weighed else None
    found = fit_basis(group(given, COLUMNS, inputs), init, "auto")
    for depth, mine in computed(found).items():
        assert torch.allclose(mine, given[depth], atol=1e-4)


def test_few_rows_are_spanned_by_as_many_directions():
    given = [weight[:3] for weight in weights(2)]
    for inputs in (None, [moment(COLUMNS, 1), moment(COLUMNS, 2)]):
        found = fit_basis(group(given, 6, inputs), "svd", "auto")
        assert all(torch.allclose(mine, given[depth], atol=1e-4) for depth, mine in computed(found).items())


@pytest.mark.parametrize("weighed", [False, True])
def test_loras_take_what_the_basis_leaves(weighed):
    given = weights(2)
    inputs = [moment(COLUMNS, seed) for seed in range(2)] if weighed else None
    task = group(given, 3, inputs, lora=2)
    losses = {}
    for init in ("zero", "svd", "joint"):
        found = fit_basis(task, init, "exact")
        assert {tuple(each.shape) for pair in found.pairs.values() for each in pair} == {(2, COLUMNS), (ROWS, 2)}
        losses[init] = lost(task, computed(found))
    bare = fit_basis(group(given, 3, inputs), "svd", "exact")
    assert losses["zero"] == pytest.approx(lost(task, computed(bare)), rel=1e-5)
    assert losses["joint"] < losses["svd"] < 0.9 * losses["zero"]
    # Alone, a depth's own directions are its weight's truncation.
    svd = fit_basis(task, "svd", "exact")
    for depth, (a, b) in svd.pairs.items():
        residual = given[depth] - svd.weight(depth)
        assert torch.allclose(b @ a, task.weighting(depth).truncate(residual, 2, "exact", 0).matrix(), atol=1e-4)


def test_the_same_group_gives_the_same_bits():
    task = group(weights(2), 4, [moment(COLUMNS, 1), moment(COLUMNS, 2)])
    one, other = (fit_basis(task, "svd", "auto") for _ in range(2))
    assert torch.equal(one.a, other.a)
    assert all(torch.equal(one.coefficients[depth], other.coefficients[depth]) for depth in (0, 1))


def test_weights_of_zero_are_no_trouble():
    given = [torch.zeros(ROWS, COLUMNS)] * 2
    for inputs in (None, [moment(COLUMNS, 1), moment(COLUMNS, 2)]):
        found = fit_basis(replace(group(given, 4, inputs, lora=2)), "svd", "auto")
        assert not any(mine.any() for mine in computed(found).values())
        assert all(a.any() for a, _ in found.pairs.values())
