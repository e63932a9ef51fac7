"""Error curves: the error of tying and factorising for each rank of each stored linear."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from refold.blueprint.origins import ErrorMetric, Initialisation, carried_tensor, sources_of
from refold.blueprint.schema import Blueprint, Pool, part_linears, users_of
from refold.calibration.moments import MomentStore
from refold.calibration.weighting import INPUT_RIDGE, OUTPUT_RIDGE, Weighting, parallel_sum, ridged
from refold.mixers.spec import Carried
from refold.planning.allocation import Curve, MeasuredLinear, SharedCurve
from refold.sources.pieces import PieceReader

EVERY, GROWTH = 32, 1.06
"""Curves have every rank below `EVERY`; from there on each rank is `GROWTH` times the one before."""


@dataclass(frozen=True)
class LinearSources:
    """A stored linear, with the source tensors that it is fitted to.

    Attributes:
        carried: The source's canonical tensor.
        sources: Source layers that the stored weight is made from.
        users: Depths that run it, each with the source layer that the depth replaces.
        is_native: Whether its role is the same as in the source, so that moments of the source apply.
        is_basis: Whether only a basis is stored and each depth has coefficients.
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
    """Returns the source tensors that a stored linear is fitted to; None if it is freshly initialised."""
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
    """Weightings of the errors of one stored linear: at each depth, of all depths together, and of a difference.

    Args:
        inputs: By depth, the second moment of the inputs with its ridge; None: the identity.
        outputs: By depth, the second moment of the gradients with its ridge; empty: the identity.
    """

    def __init__(self, inputs: Mapping[int, Tensor | None], outputs: Mapping[int, Tensor]):
        self.inputs, self._own_outputs = dict(inputs), dict(outputs)
        # One mean of the gradients weights errors that all members share: only then there is a closed form.
        self.outputs = torch.stack(list(outputs.values())).mean(dim=0) if outputs else None

    def with_inputs(self, depth: int, inputs: Tensor) -> "GroupWeightings":
        """Returns the weightings with another second moment of the inputs of one depth, ridge included."""
        return GroupWeightings({**self.inputs, depth: inputs}, self._own_outputs)

    @cached_property
    def _only(self) -> Weighting:
        """The weighting of a linear that one depth uses: the factors of its moments take long."""
        (depth,) = self.inputs
        return Weighting(self.inputs[depth], self._own_outputs.get(depth))

    def of(self, depth: int) -> Weighting:
        """Returns the weighting of errors at one depth."""
        if list(self.inputs) == [depth]:
            return self._only
        return Weighting(self.inputs[depth], self._own_outputs.get(depth))

    def of_all(self) -> Weighting:
        """Returns the weighting of an error that all depths share, summed over depths."""
        if len(self.inputs) == 1:
            return self._only
        given = [each for each in self.inputs.values() if each is not None]
        return Weighting(torch.stack(given).sum(dim=0) if given else None, self.outputs)

    def stack(self, weights: Mapping[int, Tensor]) -> tuple[Tensor, Weighting]:
        """Returns the stacked weights T_b W_b of all depths that share a basis, and the weighting of their inputs.

        The weighting is the mean of the depths' input moments.
        """
        given = [each.double() for each in self.inputs.values() if each is not None]
        turned = [Weighting(None, self._own_outputs.get(depth)).apply(each) for depth, each in weights.items()]
        return torch.cat(turned), Weighting(torch.stack(given).mean(dim=0) if given else None)

    def of_difference(self, like: Tensor) -> Weighting:
        """Returns the weighting of the difference of two members, for the best stored weight between them."""
        first, second = self.inputs.values()
        return Weighting(parallel_sum(first, second, like), self.outputs)

    def mean(self, weights: Mapping[int, Tensor]) -> Tensor:
        """Returns the W that minimises the summed error: (sum W_b C_b) (sum C_b)^-1."""
        if len(weights) == 1:
            return next(iter(weights.values()))
        if any(each is None for each in self.inputs.values()):
            return torch.stack(list(weights.values())).mean(dim=0)
        total = torch.stack([each for each in self.inputs.values() if each is not None]).sum(dim=0)
        summed = sum(weight.double() @ self.inputs[depth] for depth, weight in weights.items())  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
        assert isinstance(summed, Tensor)
        return torch.linalg.solve(total, summed.T).T.float().contiguous()


def read_weightings(
    weight: ErrorMetric, group: LinearSources, store: MomentStore | None, device: str = "cpu"
) -> GroupWeightings:
    """Reads the weightings of errors of a stored linear.

    Args:
        weight: The error metric.
        group: The linear.
        store: Moments; None without measurements.
        device: Device that computes.
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
    """Measures the error curves of stored linears; the weights of one linear are in memory at a time.

    Errors weighted by Fisher matrices estimate the loss of the model and are comparable as they are. Other errors are
    divided by the energy of the linear's weights under the same weighting, so that linears of different scale compare.

    Args:
        groups: The stored linears.
        weight: The error metric.
        is_joint: Whether stored weight and LoRAs are fitted together.
        pieces: Reader of the source.
        store: Moments that errors are weighted by; None without weighting.
        device: Device that computes.
        progress: Called with the number of linears that are done.
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
    # Same rule as `fit_joint`: the weighted mean if the part uses all tied layers, else the mean of its sources.
    is_shared = len(group.sources) == len(weights)
    mean = weighting.mean(weights) if is_shared else torch.stack([read[layer] for layer in group.sources]).mean(dim=0)
    tying = sum((each[depth].energy(matrix - mean) for depth, matrix in weights.items() if matrix is not mean), 0.0)
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
    """Returns the error at each rank: the spectrum beyond the rank, plus the error that no rank recovers."""
    beyond = torch.cat((spectrum.flip(0).cumsum(0).flip(0), spectrum.new_zeros(1)))
    ranks = [*range(min(EVERY, len(spectrum)))]
    while (following := max(ranks[-1] + 1, int(ranks[-1] * GROWTH))) < len(spectrum):
        ranks.append(following)
    ranks.append(len(spectrum))
    return Curve(ranks=tuple(ranks), lost=tuple((float(beyond[rank]) + rest) / unit for rank in ranks))
