"""Units that leave a part, against brute force over all kept sets in float64."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from refold.calibration.weighting import INPUT_RIDGE, OUTPUT_RIDGE, Moments, ridged
from refold.calibration.widths import (
    Output,
    find_removal,
    norm_order,
    refitted,
    removal_order,
    unit_columns,
    width_losses,
)

OUT, NEURONS, GROUPS, UNIT = 7, 12, 4, 6


def moments(size: int, seed: int = 0, with_outputs: bool = True) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5 * size, size, generator=generator) @ torch.randn(size, size, generator=generator)
    g = torch.randn(64, OUT, generator=generator) * torch.logspace(0, -2, OUT)
    return Moments(x.T @ x / len(x), g.T @ g / len(g) if with_outputs else None)


def weight(columns: int, seed: int = 1) -> Tensor:
    return torch.randn(OUT, columns, generator=torch.Generator().manual_seed(seed))


def loss_of(matrix: Tensor, found: Moments, columns: list[int], narrow: Tensor | None = None) -> float:
    """0.5 tr(G D A D^T) by loops over outputs, with the best weight of the kept columns from a least-squares solver."""
    a = ridged(found.inputs, INPUT_RIDGE)
    g = torch.eye(OUT, dtype=torch.float64)
    if found.outputs is not None:
        g = ridged(found.outputs, OUTPUT_RIDGE)
    root = torch.linalg.cholesky(a)
    wide = matrix.double()
    best = torch.linalg.lstsq(root[columns].T, (wide @ root).T).solution.T
    change = wide.clone()
    change[:, columns] -= best if narrow is None else narrow.double()
    return 0.5 * sum(float(g[i, j] * (change[i] @ a @ change[j])) for i in range(OUT) for j in range(OUT))


def test_a_refit_is_the_least_squares_solution() -> None:
    matrix, found, kept = weight(NEURONS), moments(NEURONS), torch.tensor([0, 3, 4, 9])
    made = refitted(matrix, found.inputs, kept)
    best = loss_of(matrix, found, kept.tolist())
    assert loss_of(matrix, found, kept.tolist(), made) == pytest.approx(best, rel=1e-6)
    # Control: the columns as they were are worse.
    assert loss_of(matrix, found, kept.tolist(), matrix[:, kept]) > 1.05 * best


@pytest.mark.parametrize("with_outputs", [True, False])
def test_losses_are_those_of_the_kept_neurons_after_the_refit(with_outputs: bool) -> None:
    matrix, found = weight(NEURONS), moments(NEURONS, with_outputs=with_outputs)
    removal = removal_order([Output(matrix, found)])
    for count in (11, 8, 5, 1):
        kept = removal.kept(count)
        assert removal.loss(count) == pytest.approx(loss_of(matrix, found, kept.tolist()), rel=1e-6)
    assert list(removal.losses) == sorted(removal.losses)


def test_the_first_neurons_that_leave_are_the_best_of_all_choices() -> None:
    matrix, found = weight(NEURONS), moments(NEURONS)
    removal = removal_order([Output(matrix, found)])
    every = {kept: loss_of(matrix, found, list(kept)) for kept in combinations(range(NEURONS), NEURONS - 1)}
    assert removal.loss(NEURONS - 1) == pytest.approx(min(every.values()))
    pairs = [loss_of(matrix, found, list(kept)) for kept in combinations(range(NEURONS), NEURONS - 3)]
    assert removal.loss(NEURONS - 3) <= min(pairs) * 1.2 < sorted(pairs)[len(pairs) // 2]


def test_one_of_two_equal_neurons_leaves_for_nothing_and_the_other_stays() -> None:
    spread = torch.eye(NEURONS - 1)[[*range(NEURONS - 1), 5]]
    doubled = Moments(spread @ spread.T, None)
    matrix = torch.ones(OUT, NEURONS)
    removal = removal_order([Output(matrix, doubled)])
    twins = {5, NEURONS - 1}
    assert removal.order[0] in twins
    assert removal.loss(NEURONS - 1) < 0.05 * (removal.loss(NEURONS - 2) - removal.loss(NEURONS - 1))
    # Control: without the update after the first, the other twin would look as cheap and leave next.
    assert twins & set(removal.kept(2).tolist())


def test_blocks_find_the_order_of_single_removals(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, found = weight(NEURONS * 16), moments(NEURONS * 16)
    monkeypatch.setattr("refold.calibration.widths.STEPS", 10**6)
    single = removal_order([Output(matrix, found)])
    monkeypatch.setattr("refold.calibration.widths.STEPS", 32)
    blocks = removal_order([Output(matrix, found)])
    count = NEURONS * 8
    assert blocks.loss(count) == pytest.approx(single.loss(count), rel=0.01)
    monkeypatch.setattr("refold.calibration.widths.CANDIDATES", 1)
    monkeypatch.setattr("refold.calibration.widths.STEPS", 2)
    assert removal_order([Output(matrix, found)]).loss(count) > 1.02 * single.loss(count)


def test_a_group_leaves_with_all_its_columns() -> None:
    matrix, found = weight(GROUPS * UNIT), moments(GROUPS * UNIT)
    removal = removal_order([Output(matrix, found)], UNIT)
    for count in (3, 2, 1):
        columns = unit_columns(removal.kept(count), UNIT)
        assert removal.loss(count) == pytest.approx(loss_of(matrix, found, columns.tolist()), rel=1e-6)
    alone = [
        loss_of(matrix, found, unit_columns(torch.tensor([g for g in range(GROUPS) if g != gone]), UNIT).tolist())
        for gone in range(GROUPS)
    ]
    assert removal.loss(3) == pytest.approx(min(alone))


def test_tied_parts_lose_the_same_units_and_their_losses_add_up() -> None:
    pairs = [(weight(NEURONS, seed), moments(NEURONS, seed)) for seed in (1, 2)]
    removal = removal_order([Output(*each) for each in pairs], least=3)
    kept = removal.kept(5).tolist()
    assert removal.loss(5) == pytest.approx(sum(loss_of(*each, kept) for each in pairs), rel=1e-6)
    assert len(removal.order) == NEURONS - 3


def test_width_losses_read_the_last_linear_of_the_part() -> None:
    mlp = {"up_proj": weight(4)[:1].T, "down_proj": weight(NEURONS)}
    found = {"down_proj": moments(NEURONS)}
    removal = find_removal(mlp, found)
    assert width_losses(mlp, found, [12, 6, 3]) == [0.0, removal.loss(6), removal.loss(3)]
    attention, seen = {"o_proj": weight(GROUPS * UNIT)}, {"o_proj": moments(GROUPS * UNIT)}
    expected = removal_order([Output(attention["o_proj"], seen["o_proj"])], UNIT)
    assert width_losses(attention, seen, [2, 4], groups=GROUPS) == [expected.loss(2), 0.0]


def test_by_norms_the_smallest_products_leave_first() -> None:
    up, gate, down = torch.ones(3, 4), torch.ones(3, 4), torch.ones(2, 3)
    up[1] *= 0.5
    down[:, 1] *= 10
    gate[2] *= 0.1
    removal = norm_order([{"up_proj": up, "gate_proj": gate, "down_proj": down}], "mlp")
    assert removal.order == (2, 0, 1)
    values, output = torch.ones(4, 5), torch.ones(5, 8)
    values[:2] *= 3
    assert norm_order([{"v_proj": values, "o_proj": output}], "mixer", 4).order == (1, 0)
