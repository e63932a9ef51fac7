"""Rounding with error feedback: inputs of a linear that are rounded later correct the error of earlier ones."""

import torch
from jaxtyping import Float
from torch import Tensor

from refold.blueprint.integers import Scheme
from refold.nn.rounding import Rounded, by_groups, choose_ranges, round_to

DAMPING = 0.01
"""Share of the mean of the Hessian's diagonal that is added to it."""
BLOCK = 128
"""Number of columns whose errors are applied to the columns after them at once."""


def round_with_feedback(
    weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"], scheme: Scheme, damping: float = DAMPING
) -> Rounded:
    """Rounds a weight so that its outputs on calibration text change least.

    With H the second moment of the inputs, the error of outputs is tr(E H E^T) for a change E of the weight. Columns
    are rounded one after another; for a column with error e, the columns that are not rounded yet get the change that
    minimises the error, -e U_i,j / U_i,i, with U^T U = H^-1 and U upper triangular (GPTQ, arXiv 2210.17323,
    algorithm 1). The column with the largest H_i,i is first. Ranges are chosen before, by errors weighted by H_i,i.

    Args:
        weight: The weight.
        moment: H up to a factor: the sum of x x^T over tokens.
        scheme: Bits, groups and zero point.
        damping: As `DAMPING`.
    """
    hessian = _damped(moment, damping)
    importance = hessian.diagonal().float()
    padded = by_groups(weight, scheme)
    scale, zero_point = choose_ranges(padded, scheme, importance.expand_as(weight))
    order = importance.argsort(descending=True, stable=True)
    group = torch.div(order, padded.shape[2], rounding_mode="floor")
    scales, points = scale[:, group, 0].T.contiguous(), zero_point[:, group, 0].T.contiguous()
    found = _round_columns(weight.float().T[order].contiguous(), _upper_root(hessian, order), scales, points, scheme)
    integers = torch.empty_like(found)
    integers[order] = found
    return Rounded(_fill(integers.T, padded, zero_point), scale, zero_point, weight.shape[1])


def _damped(moment: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    wide = moment.double()
    wide = (wide + wide.T) / 2
    diagonal = wide.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        return torch.eye(len(wide), dtype=torch.float64, device=wide.device)
    return wide + damping * mean * torch.eye(len(wide), dtype=torch.float64, device=wide.device)


def _upper_root(hessian: Float[Tensor, "in in"], order: Tensor) -> Float[Tensor, "in in"]:
    """Returns the upper triangular U with U^T U = H^-1, for columns in an order."""
    ordered = hessian[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _round_columns(
    columns: Float[Tensor, "in out"], root: Float[Tensor, "in in"], scales: Tensor, points: Tensor, scheme: Scheme
) -> Float[Tensor, "in out"]:
    """Returns the integers of columns that stand in the order of rounding, one in a row; `columns` is changed."""
    found = torch.empty_like(columns)
    for first in range(0, len(columns), BLOCK):
        block = columns[first : first + BLOCK]
        errors = torch.empty_like(block)
        for place in range(len(block)):
            at = first + place
            integers = round_to(block[place], scales[at], points[at], scheme)
            found[at] = integers
            error = (block[place] - scales[at] * (integers - points[at])) / root[at, at]
            errors[place] = error
            block[place + 1 :].addr_(root[at, at + 1 : first + len(block)], error, alpha=-1)
        rest = columns[first + BLOCK :]
        rest.addmm_(root[first : first + len(block), first + BLOCK :].T, errors, alpha=-1)
    return found


def _fill(integers: Float[Tensor, "out in"], padded: Tensor, zero_point: Tensor) -> Tensor:
    """Returns integers by groups; the last group is filled up with its zero point."""
    missing = padded.shape[1] * padded.shape[2] - integers.shape[1]
    filled = zero_point[:, -1].expand(len(integers), missing)
    return torch.cat((integers, filled), dim=1).view(padded.shape)
