"""All forms of a matrix with their predicted losses, and the few of them that a choice can want."""

from collections.abc import Sequence
from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from refold.blueprint.integers import FIT_SCHEMES, SchemeName, find_scheme
from refold.calibration.rounding_errors import MatrixErrors
from refold.calibration.weighting import Moments
from refold.families.arch import Frozen
from refold.fitting.form_costs import matrix_costs
from refold.fitting.menu import MatrixForm, MenuMatrix

MIXES = (1.0, 0.7, 0.4, 0.2, 0.0)
"""Shares of bytes in a mixed price of bytes and FLOPs, for which the forms are compared."""
NEAR = 1.25
"""A form is kept if its loss is at most this factor above the lower hull at its cost."""


SAMPLED_ROWS = 96
"""Rows on which rounding is tried: against 256 rows, losses of a wide matrix change by at most 2%."""
FACTOR_BITS = 3
"""Fewest bits of factors: below, a lower rank in more bits is better."""


class MatrixOptions(Frozen):
    """The forms of matrices that are measured."""

    schemes: tuple[SchemeName, ...] = FIT_SCHEMES
    """Schemes of integers, most precise first."""
    multiple: Annotated[int, Field(gt=0)] = 32
    """Ranks are multiples of this number."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Smallest rank as a share of the rank at which two factors are as large as the matrix."""

    def factor_schemes(self) -> tuple[str, ...]:
        """Returns the schemes of factors: the last, which takes the fewest bytes, of each number of bits."""
        last = {find_scheme(name).bits: name for name in self.schemes}
        return tuple(name for bits, name in last.items() if bits >= FACTOR_BITS)

    def ranks(self, rows: int, columns: int) -> tuple[int, ...]:
        """Returns the ranks of a matrix whose factors are smaller than the matrix."""
        even = rows * columns / (rows + columns)
        least = max(self.multiple, self.floor * even)
        return tuple(rank for rank in range(self.multiple, int(even) + 1, self.multiple) if least <= rank < even)


def measure_matrix(
    name: str, weight: Float[Tensor, "out in"], moments: Moments, options: MatrixOptions, seed: int = 0
) -> MenuMatrix:
    """Returns all forms of a matrix: whole and as two factors of each rank, in floats and by each scheme.

    Losses are 0.5 tr(G D C D^T), as `refold.calibration.rounding_errors` predicts them. The first form is the matrix as
    it is.

    Args:
        name: Name of the linear.
        weight: Its weight.
        moments: Its moments.
        options: Schemes and ranks.
        seed: Seed of the rows on which rounding is tried.
    """
    rows, columns = weight.shape
    errors = MatrixErrors(weight, moments, rows=SAMPLED_ROWS, seed=seed)
    losses: dict[tuple[int | None, str | None], float] = {(None, None): 0.0}
    losses |= {(None, scheme): loss for scheme, loss in errors.whole(options.schemes).items()}
    ranks = options.ranks(rows, columns)
    if ranks:
        losses |= errors.factored(ranks, (None, *options.factor_schemes()))
    forms = tuple(
        MatrixForm(rank=rank, scheme=scheme, loss=max(0.0, loss), costs=matrix_costs(rows, columns, scheme, rank))
        for (rank, scheme), loss in losses.items()
    )
    return MenuMatrix(name=name, rows=rows, columns=columns, forms=forms)


def pruned(matrix: MenuMatrix) -> MenuMatrix:
    """Returns a matrix without the forms that are far above the lower hull of loss against every mix of costs.

    The first form is always kept. Milliseconds lie between bytes and FLOPs, so there is no hull for them.
    """
    whole = matrix.forms[0]
    wanted = {0}
    for mix in MIXES:
        prices = [
            mix * form.costs.bytes / whole.costs.bytes + (1 - mix) * form.costs.flops / (whole.costs.flops or 1)
            for form in matrix.forms
        ]
        wanted |= near_hull(prices, [form.loss for form in matrix.forms])
    return matrix.model_copy(update={"forms": tuple(matrix.forms[place] for place in sorted(wanted))})


def near_hull(prices: Sequence[float], losses: Sequence[float], near: float = NEAR) -> set[int]:
    """Returns the places of points on the lower convex hull, and of points at most a factor above it.

    Args:
        prices: Cost of each point.
        losses: Loss of each point, not negative.
        near: The factor.
    """
    order = sorted(range(len(prices)), key=lambda place: (prices[place], losses[place]))
    hull: list[int] = []
    for place in order:
        if hull and losses[place] >= losses[hull[-1]]:
            continue  # Not cheaper than the last, and no better.
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], place, prices, losses):
            hull.pop()
        hull.append(place)
    kept = set(hull)
    segment = 0
    for place in order:
        while segment + 1 < len(hull) and prices[hull[segment + 1]] <= prices[place]:
            segment += 1
        one = hull[segment]
        bound = losses[one]
        if segment + 1 < len(hull) and prices[place] > prices[one]:
            other = hull[segment + 1]
            share = (prices[place] - prices[one]) / (prices[other] - prices[one])
            bound += share * (losses[other] - losses[one])
        if losses[place] <= near * bound:
            kept.add(place)
    return kept


def _is_above(one: int, middle: int, other: int, prices: Sequence[float], losses: Sequence[float]) -> bool:
    run, rise = prices[other] - prices[one], losses[other] - losses[one]
    return (losses[middle] - losses[one]) * run >= rise * (prices[middle] - prices[one])
