"""The units that leave each narrower part of a folded model, found on the source's weights and moments."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from refold.blueprint.origins import ErrorMetric
from refold.blueprint.part_sizes import LAST_LINEARS
from refold.blueprint.schema import POOLS, Blueprint, Pool
from refold.calibration.moments import MomentStore
from refold.calibration.narrowed import FIRST_LINEARS, Kept
from refold.calibration.weighting import Moments
from refold.calibration.widths import Output, Removal, norm_order, removal_order
from refold.planning.widths import (
    KEYS,
    SIZES,
    WidthCurve,
    Widths,
    allocate_widths,
    source_layers,
    unit_parameters,
    width_choices,
)
from refold.recipe.width import Width
from refold.sources.pieces import PieceReader

Removals = dict[tuple[Pool, int], Removal]
"""Removal of each stored part, by pool and part."""


class RemovalFinder(NamedTuple):
    """Finds the order in which units leave stored parts.

    Attributes:
        pieces: Reader of the source, tied layers in their common frame.
        store: Moments in the same frames; None for the error metric `none`.
        weight: The error metric.
        device: Device that computes.
    """

    pieces: PieceReader
    store: MomentStore | None
    weight: ErrorMetric
    device: str = "cpu"

    def find(self, blueprint: Blueprint, pool: Pool, part: int, least: int) -> Removal:
        """Returns the removal of a part. Tied layers lose the same units, and their losses add up.

        Args:
            blueprint: The folded model.
            pool: Pool of the part.
            part: Index of the part.
            least: Number of units that stay.
        """
        arch, layers, last = blueprint.arch, source_layers(blueprint, pool, part), LAST_LINEARS[pool]
        unit = 1 if pool == "mlp" else arch.head_dim * arch.num_attention_heads // arch.num_key_value_heads
        if self.weight == "none":
            names = [name for name in (*FIRST_LINEARS[pool], last) if name != "gate_proj" or arch.gated_mlp]
            weights = [
                {name: self.pieces.read(f"{pool}.{name}.weight", layer, torch.float32) for name in names}
                for layer in layers
            ]
            return norm_order(weights, pool, unit)
        assert self.store is not None
        outputs = []
        for layer in layers:
            inputs, gradients = self.store.read(layer, last)
            moments = Moments(
                inputs.to(self.device),
                gradients.to(self.device) if self.weight == "fisher" and gradients is not None else None,
            )
            weight = self.pieces.read(f"{pool}.{last}.weight", layer, torch.float32).to(self.device)
            outputs.append(Output(weight, moments))
        return removal_order(outputs, unit, least)

    def measure(self, blueprint: Blueprint, width: Width, progress: Callable[[int], None]) -> tuple[Widths, Removals]:
        """Measures the loss of every part at every width and divides the parameters that the shares keep.

        Errors that are weighted by Fisher matrices estimate the loss of the model and are compared as they are; others
        are divided by the loss of the whole output, so that parts of different scale compare.

        Returns:
            Widths by source layer, and the removals of all measured parts.

        Raises:
            RecipeError: The shares do not hold the smallest widths.
        """
        curves: list[WidthCurve] = []
        removals: Removals = {}
        budget = 0.0
        for done, (pool, part) in enumerate(measured_parts(blueprint, width), start=1):
            choices = width_choices(width, blueprint.arch, pool)
            removal = self.find(blueprint, pool, part, choices[0])
            removals[pool, part] = removal
            scale = 1.0 if self.weight == "fisher" else removal.whole or 1.0
            unit = unit_parameters(blueprint, pool)
            losses = tuple(removal.loss(count) / scale for count in choices)
            curves.append(WidthCurve(pool=pool, part=part, counts=choices, losses=losses, unit=unit))
            budget += getattr(width, KEYS[pool]) * choices[-1] * unit
            progress(done)
        # The small number makes up for rounding, as for even widths.
        return spread_widths(blueprint, curves, allocate_widths(curves, int(budget + 1e-6))), removals


def measured_parts(blueprint: Blueprint, width: Width) -> list[tuple[Pool, int]]:
    """Returns the stored parts whose widths are measured, by pool and part."""
    return [
        (pool, part)
        for pool in POOLS
        if getattr(width, KEYS[pool]) is not None
        for part in range(len(blueprint.pool(pool)))
    ]


def spread_widths(blueprint: Blueprint, curves: Sequence[WidthCurve], counts: Sequence[int]) -> Widths:
    """Returns the widths of parts by source layer."""
    found = {pool: [getattr(blueprint.arch, SIZES[pool])] * blueprint.arch.num_layers for pool in POOLS}
    for curve, count in zip(curves, counts, strict=True):
        for layer in source_layers(blueprint, curve.pool, curve.part):
            found[curve.pool][layer] = count
    return Widths(tuple(found["mixer"]), tuple(found["mlp"]))


def keep_units(blueprint: Blueprint, finder: RemovalFinder, known: Removals) -> Kept:
    """Returns the kept units of every narrower part, by source layer.

    Args:
        blueprint: The folded model.
        finder: Finds the removals of parts that are not known.
        known: Removals that are known.
    """
    found = {}
    for pool in POOLS:
        for index, part in enumerate(blueprint.pool(pool)):
            count = getattr(part, SIZES[pool])
            if count is None or not part.sources:
                continue
            removal = known.get((pool, index)) or finder.find(blueprint, pool, index, count)
            for layer in source_layers(blueprint, pool, index):
                found[pool, layer] = removal.kept(count)
    return found
