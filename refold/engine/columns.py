"""Searches in long rows of numbers, by columns of 32 entries that lie N // 32 apart.

A reduction over such columns runs along contiguous memory, at several times the speed of `argmax` or `topk` on a CPU.
An entry behind the last whole column is a column of its own.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

_STRIDE = 32


def reduce_columns(numbers: Float[Tensor, "R N"], reduce: Callable[[Tensor, int], Tensor]) -> Float[Tensor, "R C"]:
    """Reduces each column to one number."""
    width = numbers.shape[1] // _STRIDE
    whole = _STRIDE * width
    if not width:
        return numbers
    columns = reduce(numbers[:, :whole].unflatten(1, (_STRIDE, width)), 1)
    return columns if whole == numbers.shape[1] else torch.cat((columns, numbers[:, whole:]), dim=1)


def likeliest(
    scores: Float[Tensor, "R N"],
) -> tuple[Int64[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Returns the first index of the largest score, that score, and its distance to the second largest.

    The largest score of a row with NaN is NaN.
    """
    columns = reduce_columns(scores, torch.amax)
    best, column = columns.topk(min(2, columns.shape[1]), dim=-1)
    inside = _column(scores, column[:, 0], -torch.inf)
    row = inside.argmax(dim=-1)
    tokens = _index(row, column[:, 0], scores.shape[1])
    others = inside.scatter(1, row[:, None], -torch.inf).amax(dim=-1)
    gaps = best[:, 0] - (torch.maximum(best[:, 1], others) if best.shape[1] > 1 else others)
    tied = gaps == 0
    if bool(tied.any()):
        # Of equal scores in two columns the one with the smaller index may be in the other column.
        tokens = torch.where(tied, scores.argmax(dim=-1), tokens)
    return tokens, best[:, 0], gaps


def draw(weights: Float[Tensor, "R N"], numbers: Float64[Tensor, " R"]) -> Int64[Tensor, " R"]:
    """Draws an index of each row in proportion to its weights, by inversion of their distribution function.

    The function is over columns of the weights first, then inside the column found; sums over columns are float64.

    Args:
        weights: Weights of at least 0, at least one above 0 in each row.
        numbers: A random number in [0, 1) for each row.
    """
    masses = reduce_columns(weights, torch.sum).double()
    bounds = masses.cumsum(dim=-1)
    target = _targets(bounds, numbers)
    column = torch.searchsorted(bounds, target, right=True).clamp(max=masses.shape[1] - 1)
    rest = target - (bounds.gather(1, column) - masses.gather(1, column))
    inside = _column(weights, column[:, 0], 0.0).double().cumsum(dim=-1)
    return _index(_invert(inside, rest), column[:, 0], weights.shape[1])


def draw_in_order(weights: Float[Tensor, "R C"], numbers: Float64[Tensor, " R"]) -> Int64[Tensor, " R"]:
    """Draws as `draw` does, in the order of the entries, so that weights of 0 at the end of a row change nothing."""
    bounds = weights.double().cumsum(dim=-1)
    return _invert(bounds, _targets(bounds, numbers))


def _targets(bounds: Tensor, numbers: Tensor) -> Tensor:
    total = bounds[:, -1:]
    # A product that is rounded up to the total would lie behind every entry.
    return torch.minimum(numbers[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))


def _invert(bounds: Tensor, targets: Tensor) -> Tensor:
    """Returns the first index whose bound is above the target, at most that of the last entry with a weight."""
    found = torch.searchsorted(bounds, targets, right=True)
    # A target inside a column may exceed its bounds, because the sum of the column is rounded.
    last = (bounds < bounds[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(found, last)[:, 0]


def _column(numbers: Tensor, column: Tensor, filler: float) -> Tensor:
    """Returns the 32 entries of one column of each row; a column of one entry is filled up."""
    width = numbers.shape[1] // _STRIDE
    rows = torch.arange(_STRIDE, device=numbers.device)
    is_single = column[:, None] >= width
    places = torch.where(is_single, _STRIDE * width - width, rows * width) + column[:, None]
    return numbers.gather(1, places).masked_fill(is_single & (rows > 0), filler)


def _index(row: Tensor, column: Tensor, size: int) -> Tensor:
    """Returns the index of an entry of a column."""
    width = size // _STRIDE
    return torch.where(column < width, row * width, _STRIDE * width - width) + column
