"""Units of a part that leave (MLP neurons, key-value head groups), with the rest refitted on calibration text.

A unit is a set of adjacent inputs of the part's last linear: one input of `down_proj` for a neuron, the outputs of all
query heads that read one key-value head for a group. The other linears of the part only lose rows.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refold.blueprint.part_sizes import LAST_LINEARS
from refold.blueprint.schema import Pool
from refold.calibration.weighting import INPUT_RIDGE, OUTPUT_RIDGE, Moments, Weighting, ridged

STEPS = 64
"""Number of blocks in which neurons leave. On books-10m (704 neurons) the losses are those of single removals to one
part in a thousand, in a fifteenth of the time."""
CANDIDATES = 4
"""Candidates of a block for each neuron that leaves with it."""
TINY = 1e-300


class Output(NamedTuple):
    """The last linear of a part.

    Attributes:
        weight: Its weight.
        moments: Moments of its inputs, and of the gradients of its outputs; without `outputs`, errors count alike in
            all directions.
    """

    weight: Float[Tensor, "out in"]
    moments: Moments


class Removal(NamedTuple):
    """The order in which units leave a part.

    Attributes:
        order: Units from the first that leaves; those that would leave last are missing if they were not asked for.
        losses: Loss after the first 0, 1, 2, ... units have left, refitted.
        num_units: Number of units of the whole part.
        whole: Loss of a part whose output is zero.
    """

    order: tuple[int, ...]
    losses: tuple[float, ...]
    num_units: int
    whole: float

    def kept(self, count: int) -> Int[Tensor, " count"]:
        """Returns the `count` units that stay, in ascending order."""
        gone = set(self.order[: self.num_units - count])
        assert count >= self.num_units - len(self.order)
        return torch.tensor([unit for unit in range(self.num_units) if unit not in gone], dtype=torch.long)

    def loss(self, count: int) -> float:
        """Returns the loss with `count` units."""
        return self.losses[self.num_units - count]


def width_losses(
    weights: Mapping[str, Tensor], moments: Mapping[str, Moments], counts: Sequence[int], groups: int | None = None
) -> list[float]:
    """Predicts the loss of a narrower part at each width, with the best kept units that are found and a refit.

    The loss is 0.5 tr(G D C D^T) of the change D of the part's last linear, with the ridges of all fits: nats per
    token, if the moments have gradients.

    Args:
        weights: Weight `[out, in]` of each linear of an attention or MLP.
        moments: Moments of its linears; only those of `o_proj` or `down_proj` are read.
        counts: Numbers of neurons, or of key-value heads, that stay; each at least 1.
        groups: Number of key-value heads of the whole attention; None for an MLP.
    """
    removal = find_removal(weights, moments, min(counts), groups)
    return [removal.loss(count) for count in counts]


def find_removal(
    weights: Mapping[str, Tensor], moments: Mapping[str, Moments], least: int = 1, groups: int | None = None
) -> Removal:
    """Returns the order in which units leave one part; arguments as for `width_losses`, `least` units always stay."""
    last = LAST_LINEARS["mlp" if groups is None else "mixer"]
    weight = weights[last]
    unit = 1 if groups is None else weight.shape[1] // groups
    return removal_order([Output(weight, moments[last])], unit, least)


def removal_order(outputs: Sequence[Output], unit: int = 1, least: int = 1) -> Removal:
    """Finds the order in which units leave, each time the unit whose loss is least after the others make up for it.

    With A the moment C of the inputs and its ridge, the loss of columns E beside all that have left is
    0.5 tr(G W_E ((A^-1)_EE)^-1 W_E^T); the inverse and the weight are updated after every removal (Optimal Brain
    Surgeon, Hassibi and Stork 1992, for columns as in SparseGPT, arXiv 2301.00774). Neurons leave in blocks: among the
    cheapest candidates of a block the order is exact, and the rest is updated once for each block.

    Args:
        outputs: The last linear of a part, or of several tied parts that lose the same units: their losses add up.
        unit: Number of adjacent inputs of a unit.
        least: Number of units that stay.
    """
    states = [_State(each) for each in outputs]
    num_units = outputs[0].weight.shape[1] // unit
    alive = torch.arange(num_units)
    step = 1 if unit > 1 else max(1, num_units // STEPS)
    order: list[int] = []
    losses = [0.0]
    while (more := min(step, len(alive) - least)) > 0:
        if unit > 1:
            scores = sum(state.group_scores(unit) for state in states)
            assert isinstance(scores, Tensor)
            gone = [int(scores.argmin())]
            costs = [float(scores[gone[0]])]
        else:
            gone, costs = _cheapest(states, more)
        order += alive[gone].tolist()
        for cost in costs:
            losses.append(losses[-1] + 0.5 * cost)
        stays = torch.ones(len(alive), dtype=torch.bool)
        stays[gone] = False
        columns = (torch.tensor(gone)[:, None] * unit + torch.arange(unit)).flatten()
        for state in states:
            state.remove(columns, stays.repeat_interleave(unit))
        alive = alive[stays]
    return Removal(tuple(order), tuple(losses), num_units, sum(0.5 * _energy(each) for each in outputs))


def _energy(output: Output) -> float:
    gradients = output.moments.outputs
    outputs = None if gradients is None else ridged(gradients, OUTPUT_RIDGE)
    return Weighting(ridged(output.moments.inputs, INPUT_RIDGE), outputs).energy(output.weight)


class _State:
    """Weight and inverse moment of the columns that have not left, in float64, the outputs turned by T, T^T T = G."""

    def __init__(self, output: Output):
        moment = ridged(output.moments.inputs, INPUT_RIDGE)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
        self.weight = output.weight.double()
        if output.moments.outputs is not None:
            factor = torch.linalg.cholesky(ridged(output.moments.outputs, OUTPUT_RIDGE))
            self.weight = factor.T @ self.weight

    def scores(self) -> Tensor:
        """Returns twice the loss of each column if it left alone."""
        return self.weight.square().sum(dim=0) / self.inverse.diagonal().clamp(min=TINY)

    def group_scores(self, unit: int) -> Tensor:
        """Returns twice the loss of each unit of adjacent columns if it left alone."""
        count = len(self.inverse) // unit
        blocks = self.inverse.view(count, unit, count, unit).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        weights = self.weight.view(-1, count, unit).permute(1, 2, 0)
        return (weights * torch.linalg.solve(blocks, weights)).sum(dim=(1, 2)).cpu()

    def remove(self, columns: Tensor, stays: Tensor) -> None:
        """Takes columns out; the others make up for them."""
        share = torch.linalg.solve(self.inverse[columns[:, None], columns], self.inverse[columns])
        self.weight = (self.weight - self.weight[:, columns] @ share)[:, stays]
        self.inverse = (self.inverse - self.inverse[:, columns] @ share)[stays][:, stays]


def _cheapest(states: Sequence[_State], count: int) -> tuple[list[int], list[float]]:
    """Returns the columns that leave next, one after the other, and twice the loss that each adds."""
    scores = sum(state.scores().cpu() for state in states)
    assert isinstance(scores, Tensor)
    candidates = scores.argsort(stable=True)[: count * CANDIDATES]
    # The Gram matrix of the candidates' columns is all that their scores need.
    grams, inverses = [], []
    for state in states:
        own = state.weight[:, candidates]
        grams.append((own.T @ own).cpu())
        inverses.append(state.inverse[candidates[:, None], candidates].cpu())
    gram, inverse = torch.stack(grams), torch.stack(inverses)
    gone: list[int] = []
    costs: list[float] = []
    free = torch.ones(len(candidates), dtype=torch.bool)
    for _ in range(count):
        each = gram.diagonal(dim1=1, dim2=2) / inverse.diagonal(dim1=1, dim2=2).clamp(min=TINY)
        place = int(each.sum(dim=0).masked_fill(~free, torch.inf).argmin())
        free[place] = False
        gone.append(int(candidates[place]))
        costs.append(float(each[:, place].sum()))
        row = inverse[:, place] / inverse[:, place, place].clamp(min=TINY)[:, None]
        moved = gram[:, place]
        cross = moved[:, :, None] * row[:, None, :]
        gram = gram - cross - cross.mT + gram[:, place, place, None, None] * row[:, :, None] * row[:, None, :]
        inverse = inverse - inverse[:, :, place, None] * row[:, None, :]
    return gone, costs


def norm_order(weights: Sequence[Mapping[str, Tensor]], pool: Pool, unit: int = 1) -> Removal:
    """Orders units by the product of the norms of their weights, smallest first; nothing is refitted.

    For a neuron these are its rows of `gate_proj` and `up_proj` and its column of `down_proj`, for a key-value group
    its rows of `v_proj` and its columns of `o_proj`. The loss is the summed square of the products.

    Args:
        weights: Weights of a part, or of several tied parts that lose the same units.
        pool: Pool of the parts.
        unit: Number of adjacent inputs of a unit in the last linear.
    """
    total = torch.zeros(())
    for each in weights:
        last = each[LAST_LINEARS[pool]].double().square().sum(dim=0).unflatten(0, (-1, unit)).sum(dim=1)
        for name in ("gate_proj", "up_proj") if pool == "mlp" else ("v_proj",):
            if name in each:
                last = last * each[name].double().square().sum(dim=1).unflatten(0, (len(last), -1)).sum(dim=1)
        total = total + last.cpu()
    order = total.argsort(stable=True)
    losses = (0.0, *total[order].cumsum(0).tolist())
    return Removal(tuple(order.tolist()), losses, len(total), losses[-1])


def unit_columns(kept: Int[Tensor, " kept"], unit: int) -> Int[Tensor, " columns"]:
    """Returns the inputs of the last linear that belong to the kept units."""
    return (kept[:, None] * unit + torch.arange(unit)).flatten()


def refitted(
    weight: Float[Tensor, "out in"], inputs: Float[Tensor, "in in"], columns: Int[Tensor, " kept"]
) -> Float[Tensor, "out kept"]:
    """Returns W A_:S (A_SS)^-1: the weight on the kept inputs S whose outputs are nearest to those of the whole weight.

    It is the nearest in every weighting of outputs. A is the moment of the inputs with its ridge.
    """
    moment = ridged(inputs, INPUT_RIDGE)
    columns = columns.to(weight.device)
    own = moment[columns[:, None], columns]
    return torch.linalg.solve(own, (weight.double() @ moment[:, columns]).T).T.float().contiguous()
