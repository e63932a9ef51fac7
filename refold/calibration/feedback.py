"""Rounding with error feedback: inputs of a linear that are rounded later correct the error of earlier ones."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from refold.blueprint.integers import Scheme
from refold.nn.rounding import Rounded, as_stored, by_groups, choose_ranges, integer_range

DAMPING = 0.01
"""Share of the mean of the Hessian's diagonal that is added to it."""
BLOCK = 128
"""Number of columns whose errors are applied to the columns after them at once."""
SWEEPS = {6: 1, 5: 1}
"""Number of times that scales are fitted again and each integer is set to its best value given the others, by bits;
none at 8 bits, where rounding the scale costs as much as a sweep gains; 2 below 5."""
PULL = 1e-2
"""Weight of the scale before, as a share of the fit's diagonal: groups of correlated inputs would fit noise."""
FITTED_ELEMENTS = 1 << 23
"""Numbers that the fit of scales holds at once."""


class _Grid(NamedTuple):
    """The grid of some rows, which all have one scheme.

    Attributes:
        scheme: Bits, groups and zero point.
        scale: `[out, groups, 1]`.
        zero_point: `[out, groups, 1]`.
    """

    scheme: Scheme
    scale: Tensor
    zero_point: Tensor

    @property
    def num_sweeps(self) -> int:
        return 0 if self.scheme.bits >= 8 else SWEEPS.get(self.scheme.bits, 2)


class _Columns(NamedTuple):
    """Scale, zero point and bounds of each number, one input in a row: `[in, out]`, and `[out]` for the bounds."""

    scale: Tensor
    zero_point: Tensor
    least: Tensor
    most: Tensor

    def round(self, at: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the nearest integers for one input, and their values."""
        scale, zero_point = self.scale[at], self.zero_point[at]
        divisor = torch.where(scale == 0, 1, scale)
        integers = (values / divisor + zero_point).round_().clamp_(self.least, self.most)
        return integers, scale * (integers - zero_point)


def round_with_feedback(
    weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"], scheme: Scheme, damping: float = DAMPING
) -> Rounded:
    """Rounds a weight so that its outputs on calibration text change least.

    With H the second moment of the inputs, the error of outputs is tr(E H E^T) for a change E of the weight. Columns
    are rounded one after another; for a column with error e, the columns that are not rounded yet get the change that
    minimises the error, -e U_i,j / U_i,i, with U^T U = H^-1 and U upper triangular (GPTQ, arXiv 2210.17323,
    algorithm 1). The column with the largest H_i,i is first. Ranges are chosen before, by errors weighted by H_i,i.
    Below 8 bits scales are then fitted to the integers under H, and each integer is set to the best value given all
    others (coordinate descent), once or twice.

    Args:
        weight: The weight.
        moment: H up to a factor: the sum of x x^T over tokens.
        scheme: Bits, groups and zero point.
        damping: As `DAMPING`.
    """
    (found,) = round_by_schemes(weight, moment, [scheme], damping)
    return found


def round_by_schemes(
    weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"], schemes: Sequence[Scheme], damping: float = DAMPING
) -> list[Rounded]:
    """Rounds a weight by several schemes, which takes little longer than by one where the weight has few rows.

    Args:
        weight: The weight.
        moment: As for `round_with_feedback`.
        schemes: Bits, groups and zero points.
        damping: As `DAMPING`.
    """
    hessian, weight = _damped(moment, damping), weight.float()
    importance = hessian.diagonal().float()
    spread = importance.expand_as(weight)
    grids = [_Grid(each, *choose_ranges(by_groups(weight, each), each, spread)) for each in schemes]
    order = importance.argsort(descending=True, stable=True)
    turned = weight.T.contiguous()
    found = _round_columns(turned[order].repeat(1, len(grids)), _upper_root(hessian, order), _columns(grids, order))
    integers = torch.empty_like(found)
    integers[order] = found
    parts = list(integers.split(len(weight), dim=1))
    narrow = hessian.float()
    for sweep in range(max(grid.num_sweeps for grid in grids)):
        chosen = [place for place, grid in enumerate(grids) if grid.num_sweeps > sweep]
        swept = _sweep(turned, [parts[place] for place in chosen], narrow, [grids[place] for place in chosen])
        for place, (grid, part) in zip(chosen, swept, strict=True):
            grids[place], parts[place] = grid, part
    return [_rounded(grid, part) for grid, part in zip(grids, parts, strict=True)]


def _rounded(grid: _Grid, integers: Float[Tensor, "in out"]) -> Rounded:
    columns, group = len(integers), grid.scheme.group or len(integers)
    filled = grid.zero_point[:, -1].round().expand(-1, -columns % group)
    whole = torch.cat((integers.T, filled), dim=1).view(*grid.scale.shape[:2], group)
    return Rounded(whole, grid.scale, grid.zero_point, columns)


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


def _columns(grids: Sequence[_Grid], order: Tensor) -> _Columns:
    """Returns the grids of all rows side by side, for inputs in an order."""
    scales, points, least, most = [], [], [], []
    for scheme, scale, zero_point in grids:
        group = torch.div(order, scheme.group or len(order), rounding_mode="floor")
        scales.append(scale[:, group, 0].T)
        points.append(zero_point[:, group, 0].T)
        ends = integer_range(scheme)
        least.append(scale.new_full((len(scale),), ends[0]))
        most.append(scale.new_full((len(scale),), ends[1]))
    return _Columns(torch.cat(scales, 1), torch.cat(points, 1), torch.cat(least), torch.cat(most))


def _round_columns(
    columns: Float[Tensor, "in out"], root: Float[Tensor, "in in"], grid: _Columns
) -> Float[Tensor, "in out"]:
    """Returns the integers of columns that stand in the order of rounding, one in a row; `columns` is changed."""
    found = torch.empty_like(columns)
    for first in range(0, len(columns), BLOCK):
        block = columns[first : first + BLOCK]
        errors = torch.empty_like(block)
        for place in range(len(block)):
            at = first + place
            found[at], value = grid.round(at, block[place])
            error = (block[place] - value) / root[at, at]
            errors[place] = error
            block[place + 1 :].addr_(root[at, at + 1 : first + len(block)], error, alpha=-1)
        rest = columns[first + BLOCK :]
        rest.addmm_(root[first : first + len(block), first + BLOCK :].T, errors, alpha=-1)
    return found


def _sweep(
    weight: Float[Tensor, "in out"], parts: Sequence[Tensor], hessian: Float[Tensor, "in in"], grids: Sequence[_Grid]
) -> list[tuple[_Grid, Tensor]]:
    """Fits scales to integers, then sets each integer to its best value given all others; the error never grows.

    Args:
        weight: The weight, one input in a row.
        parts: Integers by each grid, one input in a row.
        hessian: H.
        grids: The grid of each part.
    """
    natural = torch.arange(len(weight), device=weight.device)
    fitted = [_fit_scales(weight, part, hessian, grid) for part, grid in zip(parts, grids, strict=True)]
    target, integers = weight.repeat(1, len(parts)), torch.cat(list(parts), 1)
    columns = _columns(fitted, natural)
    errors = columns.scale * (integers - columns.zero_point) - target
    slopes = hessian @ errors
    for first in range(0, len(weight), BLOCK):
        rows = slice(first, first + BLOCK)
        inside, slope, before = hessian[rows, rows], slopes[rows], errors[rows].clone()
        for place in range(len(before)):
            at = first + place
            best = target[at] + errors[at] - slope[place] / inside[place, place]
            integers[at], value = columns.round(at, best)
            new = value - target[at]
            slope.addr_(inside[place], new - errors[at])
            errors[at] = new
        slopes[first + BLOCK :].addmm_(hessian[first + BLOCK :, rows], errors[rows] - before)
    return list(zip(fitted, integers.split(weight.shape[1], dim=1), strict=True))


def _fit_scales(
    weight: Float[Tensor, "in out"], integers: Float[Tensor, "in out"], hessian: Float[Tensor, "in in"], grid: _Grid
) -> _Grid:
    """Returns the grid with the scales that fit the integers best under H; rows that do not gain keep theirs."""
    scheme, (columns, rows) = grid.scheme, weight.shape
    group = scheme.group or columns
    groups, missing = grid.scale.shape[1], -columns % group
    padded = torch.nn.functional.pad(hessian, (0, missing, 0, missing)).view(groups, group, -1)
    found = grid.scale.clone()
    step = max(1, FITTED_ELEMENTS // (groups * group * groups))
    for first in range(0, rows, step):
        some = slice(first, first + step)
        scale, zero_point = grid.scale[some], grid.zero_point[some]
        target = by_groups(weight[:, some].T, scheme)
        steps = by_groups(integers[:, some].T, scheme) - zero_point
        if missing:
            steps[:, -1, group - missing :] = 0
        reach = torch.einsum("ogi,gij->ogj", steps, padded)
        gram = torch.einsum("ogkj,okj->ogk", reach.unflatten(-1, (groups, group)), steps)
        aim = torch.einsum("ogj,oj->og", reach, target.flatten(1)).unsqueeze(-1)
        diagonal = torch.diag_embed(PULL * gram.diagonal(dim1=1, dim2=2))
        # Groups without a step keep their scale.
        diagonal += torch.diag_embed((gram.diagonal(dim1=1, dim2=2) <= 0).float())
        solved = torch.linalg.solve((gram + diagonal).double(), (aim + diagonal @ scale).double())
        new = as_stored(solved.float(), scheme)

        def cost(scales: Tensor, gram: Tensor = gram, aim: Tensor = aim) -> Tensor:
            return (scales * (gram @ scales - 2 * aim)).sum(1, keepdim=True)

        found[some] = torch.where(cost(new) < cost(scale), new, scale)
    return grid._replace(scale=found)
