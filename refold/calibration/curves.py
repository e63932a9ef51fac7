"""What each rank of each stored linear saves of the error that tying and factorising make."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refold.blueprint.contents import part_linears, users_of
from refold.blueprint.initialisation import ErrorMetric, Initialisation
from refold.blueprint.origins import carried_tensor, sources_of
from refold.blueprint.schema import Blueprint, Pool
from refold.calibration.moments import MomentStore
from refold.calibration.weighting import INPUT_RIDGE, OUTPUT_RIDGE, Weighting, parallel_sum, ridged
from refold.mixers.spec import Carried
from refold.planning.allocation import Curve, MeasuredLinear, SharedCurve
from refold.sources.pieces import PieceReader

EVERY, GROWTH = 32, 1.06
"""Curves have every rank up to the first, then ranks that grow by the second."""


@dataclass(frozen=True)
class LinearSources:
    """A stored linear, and where what it is fitted to lies.

    Attributes:
        carried: The source's canonical tensor.
        sources: Source layers the stored weight is made from.
        users: Depth to the source layer it stands for, of those that run it.
        is_native: Whether it does in the target what it does in the source, so that what was measured there holds.
        is_basis: Whether no more than a basis is stored, and each user has coefficients.
    """

    pool: Pool
    part: int
    linear: str
    shape: tuple[int, int]
    carried: Carried
    sources: tuple[int, ...]
    users: Mapping[int, int]
    is_native: bool
    is_basis: bool = False


def linear_sources(
    blueprint: Blueprint, starts: Initialisation, pool: Pool, part: int, linear: str
) -> LinearSources | None:
    """Says what a stored linear is fitted to; None where it starts fresh."""
    local = f"{linear}.weight"
    carried = carried_tensor(blueprint, starts, part, local) if pool == "mixer" else Carried(f"{pool}.{local}")
    sources = sources_of(blueprint, pool, part, local)
    if carried is None or not sources or starts.weights == "fresh":
        return None
    users = {depth: blueprint.depths[depth].source for depth in users_of(blueprint, pool, part, local)}
    shape = part_linears(blueprint, pool, part)[linear]
    is_native = pool == "mlp" or blueprint.mixers[part].mixer.is_native
    is_basis = linear in blueprint.pool(pool)[part].bases
    return LinearSources(pool, part, linear, shape, carried, sources, users, is_native, is_basis)


class GroupWeightings:
    """How errors of one stored linear are weighed: by depth, of the members together, and of their difference.

    Args:
        inputs: By depth the second moment of its inputs, with its ridge; None: every input alike.
        outputs: The same of its gradients; empty: every output alike.
    """

    def __init__(self, inputs: Mapping[int, Tensor | None], outputs: Mapping[int, Tensor]):
        self.inputs, self._own_outputs = dict(inputs), dict(outputs)
        # What all members share is weighed by one mean of their gradients: only then there is a closed form.
        self.outputs = torch.stack(list(outputs.values())).mean(dim=0) if outputs else None

    def with_inputs(self, depth: int, inputs: Tensor) -> "GroupWeightings":
        """Returns the same with another second moment, ridge included, of what one depth sees."""
        return GroupWeightings({**self.inputs, depth: inputs}, self._own_outputs)

    def of(self, depth: int) -> Weighting:
        """Returns how an error at one depth is weighed."""
        return Weighting(self.inputs[depth], self._own_outputs.get(depth))

    def of_all(self) -> Weighting:
        """Returns how an error that all depths share is weighed, summed over them."""
        given = [each for each in self.inputs.values() if each is not None]
        return Weighting(torch.stack(given).sum(dim=0) if given else None, self.outputs)

    def stack(self, weights: Mapping[int, Tensor]) -> tuple[Tensor, Weighting]:
        """Returns what members sharing a basis have one of: T_b W_b one below the other, and how their inputs weigh.

        Inputs are weighed alike, by the mean of their moments.
        """
        given = [each.double() for each in self.inputs.values() if each is not None]
        turned = [Weighting(None, self._own_outputs.get(depth)).apply(each) for depth, each in weights.items()]
        return torch.cat(turned), Weighting(torch.stack(given).mean(dim=0) if given else None)

    def of_difference(self, like: Tensor) -> Weighting:
        """Returns how the difference of two members is weighed once the stored weight has settled between them."""
        first, second = self.inputs.values()
        return Weighting(parallel_sum(first, second, like), self.outputs)

    def mean(self, weights: Mapping[int, Tensor]) -> Tensor:
        """Returns the W that minimises the summed error: (sum W_b C_b) (sum C_b)^-1."""
        if any(each is None for each in self.inputs.values()):
            return torch.stack(list(weights.values())).mean(dim=0)
        total = torch.stack([each for each in self.inputs.values() if each is not None]).sum(dim=0)
        summed = sum(weight.double() @ self.inputs[depth] for depth, weight in weights.items())  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
        assert isinstance(summed, Tensor)
        return torch.linalg.solve(total, summed.T).T.float().contiguous()


def read_weightings(
    weight: ErrorMetric, group: LinearSources, store: MomentStore | None, device: str = "cpu"
) -> GroupWeightings:
    """Reads how errors of a stored linear are weighed.

    Args:
        weight: By what.
        group: The linear.
        store: Moments; None where nothing is measured.
        device: Where to compute.
    """
    if weight == "none" or not group.is_native:
        return GroupWeightings(dict.fromkeys(group.users), {})
    assert store is not None
    found = {layer: store.read(layer, group.linear) for layer in dict.fromkeys(group.users.values())}
    inputs = {layer: ridged(moments.inputs.to(device), INPUT_RIDGE) for layer, moments in found.items()}
    outputs = {
        layer: ridged(moments.outputs.to(device), OUTPUT_RIDGE)
        for layer, moments in found.items()
        if moments.outputs is not None and weight == "fisher"
    }
    return GroupWeightings(
        {depth: inputs[layer] for depth, layer in group.users.items()},
        {depth: outputs[layer] for depth, layer in group.users.items() if layer in outputs},
    )


def measure_linears(
    groups: Sequence[LinearSources],
    weight: ErrorMetric,
    is_joint: bool,
    pieces: PieceReader,
    store: MomentStore | None = None,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> list[MeasuredLinear]:
    """Measures what there is to choose, one stored linear in memory at a time.

    Losses weighed by Fisher matrices are estimates of one thing, the loss, and stay as they are. Others are divided by
    what the linear's outputs hold in all, so that linears of different scale can be compared.

    Args:
        groups: The stored linears.
        weight: How errors are weighed.
        is_joint: Whether stored weight and LoRAs are fitted together.
        pieces: Reads the source.
        store: Moments, where errors are weighed by some.
        device: Where to compute.
        progress: Told how many linears are done.
    """
    found = []
    for done, group in enumerate(groups, start=1):
        found.append(_measure(group, weight, is_joint, pieces, store, device))
        progress(done)
    return found


def _measure(
    group: LinearSources,
    weight: ErrorMetric,
    is_joint: bool,
    pieces: PieceReader,
    store: MomentStore | None,
    device: str,
) -> MeasuredLinear:
    weighting = read_weightings(weight, group, store, device)
    layers = dict.fromkeys((*group.sources, *group.users.values()))
    read = {
        layer: pieces.read(group.carried.canonical, layer, torch.float32, group.carried.repeat).to(device)
        for layer in layers
    }
    weights = {depth: read[layer] for depth, layer in group.users.items()}
    each = {depth: weighting.of(depth) for depth in weights}
    unit = 1.0
    if weight != "fisher" or weighting.outputs is None:
        unit = sum(each[depth].energy(matrix) for depth, matrix in weights.items()) or 1.0
    if group.is_basis:
        stacked, inputs = weighting.stack(weights)
        return _measured(group, weights, _curve(inputs.spectrum(stacked), unit))
    # As in the fits: the best for all where it is made from all, else what its sources say.
    is_shared = len(group.sources) == len(weights)
    mean = weighting.mean(weights) if is_shared else torch.stack([read[layer] for layer in group.sources]).mean(dim=0)
    tying = sum(each[depth].energy(matrix - mean) for depth, matrix in weights.items())
    stored = _curve(weighting.of_all().spectrum(mean), unit, tying)
    together: tuple[SharedCurve, ...] = ()
    apart: tuple[Curve, ...] = ()
    if len(weights) > 1:
        depths = tuple(weights)
        if is_joint and len(weights) == 2:
            difference = weights[depths[0]] - weights[depths[1]]
            spectrum = weighting.of_difference(difference).spectrum(difference)
            together = (SharedCurve(curve=_curve(spectrum, unit), depths=depths),)
        else:
            together = tuple(
                SharedCurve(curve=_curve(each[depth].spectrum(weights[depth] - mean), unit), depths=(depth,))
                for depth in depths
            )
        apart = tuple(_curve(each[depth].spectrum(weights[depth]), unit) for depth in depths)
    return _measured(group, weights, stored, together, apart)


def _measured(
    group: LinearSources,
    weights: Mapping[int, Tensor],
    stored: Curve,
    together: tuple[SharedCurve, ...] = (),
    apart: tuple[Curve, ...] = (),
) -> MeasuredLinear:
    rows, columns = group.shape
    return MeasuredLinear(
        pool=group.pool,
        part=group.part,
        linear=group.linear,
        rows=rows,
        columns=columns,
        depths=tuple(weights),
        stored=stored,
        together=together,
        apart=apart,
        is_basis=group.is_basis,
    )


def _curve(spectrum: Tensor, unit: float, rest: float = 0.0) -> Curve:
    """Losses at some ranks: what the spectrum holds beyond them, and what no rank recovers."""
    beyond = torch.cat((spectrum.flip(0).cumsum(0).flip(0), spectrum.new_zeros(1)))
    ranks = [*range(min(EVERY, len(spectrum)))]
    while (following := max(ranks[-1] + 1, int(ranks[-1] * GROWTH))) < len(spectrum):
        ranks.append(following)
    ranks.append(len(spectrum))
    return Curve(ranks=tuple(ranks), lost=tuple((float(beyond[rank]) + rest) / unit for rank in ranks))
