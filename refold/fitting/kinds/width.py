"""A narrower part: fewer neurons of an MLP, or fewer key-value head groups of an attention."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from refold.blueprint.schema import POOLS, MixerPart, Pool
from refold.calibration.feedback import DAMPING
from refold.calibration.weighting import Moments
from refold.calibration.widths import LAST_LINEARS, find_removal, refitted, unit_columns
from refold.families.arch import ArchSpec
from refold.fitting.form_costs import matrix_costs
from refold.fitting.kinds.kind import MeasuredPart, PartKind
from refold.fitting.kinds.whole import whole_costs
from refold.fitting.menu import MatrixForm, MenuMatrix, PartForm
from refold.mixers.spec import MLP

SIXTEENTHS = (15, 14, 13, 12, 11, 10, 8, 6, 4)
"""Widths of an MLP that are offered, in sixteenths of the whole."""


class NarrowerPart(PartKind):
    """Keeps the units whose loss is highest when they leave, and refits the rest (`refold.calibration.widths`).

    The forms of the matrices of a narrower part are those of the whole part, scaled (`narrower`).
    """

    name = "width"
    pools = POOLS

    def forms(self, part: MeasuredPart, whole: Sequence[MenuMatrix]) -> Iterator[PartForm]:
        counts = offered_counts(part)
        if not counts:
            return
        groups = part.arch.num_key_value_heads if part.pool == "mixer" else None
        removal = find_removal(part.weights, part.moments, min(counts), groups)
        for count in counts:
            arch = narrowed(part.arch, part.pool, count)
            spec = MLP if part.pool == "mlp" else MixerPart().mixer
            shapes, shares = spec.linears(arch), self._shares(part, removal.kept(count))
            yield PartForm(
                kind=self.name,
                setting={_key(part.pool): count},
                loss=removal.loss(count),
                costs=whole_costs(arch, part.layer, part.pool, part.context),
                matrices=tuple(narrower(matrix, shapes[matrix.name], shares[matrix.name]) for matrix in whole),
            )

    def write(self, recipe: dict[str, Any], arch: ArchSpec, chosen: Mapping[int, PartForm], pool: Pool) -> None:
        if not chosen:
            return
        full = arch.intermediate_size if pool == "mlp" else arch.num_key_value_heads
        counts = [chosen[layer].setting[_key(pool)] if layer in chosen else full for layer in range(arch.num_layers)]
        section = recipe.setdefault("width", {"weight": "fisher"})
        section["mlp" if pool == "mlp" else "heads"] = counts

    def _shares(self, part: MeasuredPart, kept: Int[Tensor, " kept"]) -> dict[str, float]:
        """Returns the share of the rounding errors of each linear that a narrower part has."""
        units, found = _units(part.arch, part.pool), {}
        for name, weight in part.weights.items():
            outputs = _output_weights(weight, part.moments[name])
            if name == LAST_LINEARS[part.pool]:
                inputs = part.moments[name].inputs
                columns = unit_columns(kept, weight.shape[1] // units)
                narrow = refitted(weight, inputs, columns)
                own = inputs[columns[:, None], columns]
                found[name] = _energy(narrow, own, outputs) / _energy(weight, inputs, outputs)
            else:
                energies = weight.square().sum(dim=1) * outputs
                found[name] = float(energies[unit_columns(kept, weight.shape[0] // units)].sum() / energies.sum())
        return found


def narrower(matrix: MenuMatrix, shape: tuple[int, int], share: float) -> MenuMatrix:
    """Returns the forms of a matrix in a narrower part, from those in the whole part.

    Errors of rounding are scaled by a share. A rank leaves as much of a narrower matrix as a higher rank leaves of the
    whole one: the rank at which both pairs of factors are the same share of their matrix.

    Args:
        matrix: The matrix of the whole part, with all its forms.
        shape: Rows and columns in the narrower part.
        share: Share of the whole's errors.
    """
    rows, columns = shape
    stretch = (matrix.rows * matrix.columns * (rows + columns)) / ((matrix.rows + matrix.columns) * rows * columns)
    if columns == matrix.columns:
        stretch = stretch**0.5  # Between no stretch and the whole stretch, as measured on books-10m.
    left = {form.rank: form.loss for form in matrix.forms if form.rank is not None and form.scheme is None}
    ranks = [*sorted(left), min(matrix.rows, matrix.columns)]
    losses = [*(left[rank] for rank in ranks[:-1]), 0.0]
    found = []
    for form in matrix.forms:
        loss = form.loss
        if form.rank is not None:
            if form.rank >= min(shape):
                continue
            loss += float(np.interp(form.rank * stretch, ranks, losses)) - left[form.rank]
        costs = matrix_costs(rows, columns, form.scheme, form.rank)
        found.append(MatrixForm(rank=form.rank, scheme=form.scheme, loss=max(0.0, loss) * share, costs=costs))
    return MenuMatrix(name=matrix.name, rows=rows, columns=columns, forms=tuple(found))


def offered_counts(part: MeasuredPart) -> list[int]:
    """Returns the numbers of neurons or key-value heads that are offered for a part, most first."""
    whole = _units(part.arch, part.pool)
    if part.pool == "mixer":
        if part.arch.qk_norm == "full":
            return []  # One norm over all heads would change with each head that leaves.
        return list(range(whole - 1, 0, -1)) if whole <= len(SIXTEENTHS) else _even_counts(whole, 1)
    return _even_counts(whole, part.multiple)


def narrowed(arch: ArchSpec, pool: Pool, count: int) -> ArchSpec:
    """Returns the source with the sizes of a narrower part."""
    if pool == "mlp":
        return arch.model_copy(update={"intermediate_size": count})
    readers = arch.num_attention_heads // arch.num_key_value_heads
    return arch.model_copy(update={"num_key_value_heads": count, "num_attention_heads": count * readers})


def _even_counts(whole: int, multiple: int) -> list[int]:
    counts = {round(whole * share / 16 / multiple) * multiple for share in SIXTEENTHS}
    return sorted((count for count in counts if 0 < count < whole), reverse=True)


def _key(pool: Pool) -> str:
    return "neurons" if pool == "mlp" else "groups"


def _units(arch: ArchSpec, pool: Pool) -> int:
    return arch.intermediate_size if pool == "mlp" else arch.num_key_value_heads


def _output_weights(weight: Tensor, moments: Moments) -> Float[Tensor, " out"]:
    return torch.ones(len(weight)) if moments.outputs is None else moments.outputs.diagonal()


def _energy(weight: Float[Tensor, "out in"], inputs: Float[Tensor, "in in"], outputs: Float[Tensor, " out"]) -> float:
    """Returns the expected error of rounding with feedback, up to a factor.

    An input's error counts by the variance that is left when all inputs with a smaller moment, which are rounded later,
    make up for it: the squared diagonal of a Cholesky factor.
    """
    damped = inputs.double() + DAMPING * inputs.diagonal().double().mean() * torch.eye(len(inputs))
    order = damped.diagonal().argsort(stable=True)
    left = torch.linalg.cholesky(damped[order[:, None], order]).diagonal().square()
    return float((weight[:, order].double().square() * left).sum(dim=1) @ outputs.double())
