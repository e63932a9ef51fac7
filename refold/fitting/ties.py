"""Ties of two neighbouring layers: one stored part, the weighted mean, that both run with their own norms."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from refold.blueprint.schema import Pool
from refold.calibration.curves import GroupWeightings
from refold.calibration.rounding_errors import weighted_error
from refold.calibration.weighting import INPUT_RIDGE, OUTPUT_RIDGE, Moments, ridged
from refold.families.arch import ArchSpec
from refold.fitting.kinds.whole import whole_costs
from refold.fitting.menu import Costs, MatrixForm, MenuMatrix, TieForm

ReadWeight = Callable[[int, str], Tensor]
"""Returns the float32 weight of a layer's linear."""
ReadMoments = Callable[[int, str], Moments]
"""Returns the moments of a layer's linear."""


class Tied(NamedTuple):
    """Both layers' matrices with all their forms, by layer.

    Attributes:
        first: Matrices of the first layer's part.
        second: Matrices of the second's.
    """

    first: Sequence[MenuMatrix]
    second: Sequence[MenuMatrix]


def can_tie(arch: ArchSpec, pool: Pool, first: int) -> bool:
    """Says whether a layer and the next may use one part: mixers only with one window and one rotary embedding."""
    return pool == "mlp" or arch.layers[first] == arch.layers[first + 1]


def tie_form(arch: ArchSpec, pool: Pool, first: int, tied: Tied, loss: float, context: int) -> TieForm:
    """Returns the form of two tied layers.

    A stored form of a shared matrix makes the errors of both layers; they are taken from the layers' own forms.

    Args:
        arch: The source.
        pool: Pool of the parts.
        first: The first layer; the second follows it.
        tied: The matrices of both.
        loss: From `tie_loss`.
        context: Tokens at which cache and FLOPs are counted.
    """
    one, two = (whole_costs(arch, layer, pool, context) for layer in (first, first + 1))
    matrices = []
    for mine, other in zip(tied.first, tied.second, strict=True):
        losses = {(form.rank, form.scheme): form.loss for form in other.forms}
        forms = tuple(
            MatrixForm(
                rank=form.rank,
                scheme=form.scheme,
                loss=form.loss + losses[form.rank, form.scheme],
                costs=Costs(bytes=form.costs.bytes, flops=2 * form.costs.flops),
            )
            for form in mine.forms
            if (form.rank, form.scheme) in losses
        )
        matrices.append(MenuMatrix(name=mine.name, rows=mine.rows, columns=mine.columns, forms=forms))
    return TieForm(pool=pool, layers=(first, first + 1), loss=loss, costs=one.plus(two), matrices=tuple(matrices))


def tie_loss(linears: Sequence[str], first: int, read_weight: ReadWeight, read_moments: ReadMoments) -> float:
    """Returns the loss of the weighted mean (W_1 C_1 + W_2 C_2) (C_1 + C_2)^-1 of each linear, summed over both layers.

    Args:
        linears: Linears of the part.
        first: The first layer; the second follows it.
        read_weight: Reads weights.
        read_moments: Reads moments.
    """
    total = 0.0
    for linear in linears:
        weights = {layer: read_weight(layer, linear) for layer in (first, first + 1)}
        moments = {layer: read_moments(layer, linear) for layer in weights}
        inputs = {layer: ridged(each.inputs, INPUT_RIDGE) for layer, each in moments.items()}
        shared = GroupWeightings(inputs, {}).mean(weights)
        for layer, weight in weights.items():
            gradients = moments[layer].outputs
            outputs = None if gradients is None else ridged(gradients, OUTPUT_RIDGE)
            total += weighted_error(shared - weight, Moments(inputs[layer], outputs))
    return total
