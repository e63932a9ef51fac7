"""Rounding of a weight to the integers of a weight-only quantisation scheme, and the tensors that store the result."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refold.blueprint.integers import Scheme
from refold.nn.bits import pack_bits, unpack_bits


class Rounded(NamedTuple):
    """Integers of a weight and the numbers that turn them back: `scale * (integer - zero_point)`.

    The last axis of the integers is filled up with the integer of zero, or one next to it, until it holds whole groups.

    Attributes:
        integers: `[out, groups, group]`, whole numbers in float32.
        scale: `[out, groups, 1]`, float32 numbers that bfloat16 holds exactly.
        zero_point: `[out, groups, 1]`, whole numbers in float32. In a scheme without zero points it is `Scheme.middle`:
            0 for whole rows, whose integers are signed, else the middle of the unsigned integers.
        columns: Length of a row of the weight.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    columns: int

    def dequantise(self) -> Float[Tensor, "out in"]:
        """Returns the weight that the integers stand for, in float32."""
        weight = self.scale * (self.integers - self.zero_point)
        return weight.reshape(len(weight), -1)[:, : self.columns]

    def store(self, scheme: Scheme) -> dict[str, Tensor]:
        """Returns the tensors that hold the weight, by the suffix of their names (`Scheme.pieces`)."""
        rows = len(self.integers)
        integers = self.integers.flatten(1)[:, : self.columns] + _offset(scheme)
        found = {
            "_packed": pack_bits(integers.to(torch.uint8), scheme.bits),
            "_scale": self.scale[..., 0].to(torch.bfloat16),
            "_shape": torch.tensor([rows, self.columns], device=integers.device),
        }
        if scheme.has_zero_point:
            points = self.zero_point[..., 0].T.to(torch.uint8)
            found["_zero_point"] = pack_bits(points.contiguous(), scheme.bits).T.contiguous()
        return found


def read_stored(
    pieces: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], points: Tensor | None = None
) -> Rounded:
    """Returns the integers of a weight from the tensors that hold it.

    Args:
        pieces: By suffix, as `Rounded.store` returns them; the shape is not read.
        scheme: The scheme of the weight.
        shape: `(out, in)`.
        points: Zero points `[out, groups]` where they are unpacked already.
    """
    rows, columns = shape
    integers = unpack_bits(pieces["_packed"], scheme.bits, columns).float() - _offset(scheme)
    scale = pieces["_scale"].float().unsqueeze(-1)
    if scheme.has_zero_point:
        found = unpack_bits(pieces["_zero_point"].T.contiguous(), scheme.bits, rows).T if points is None else points
        zero_point = found.float().contiguous().unsqueeze(-1)
    else:
        zero_point = torch.full_like(scale, scheme.middle)
    group = scheme.group or columns
    missing = -columns % group
    if missing:
        filled = zero_point[:, -1].round().expand(rows, missing)
        integers = torch.cat((integers, filled), dim=1)
    return Rounded(integers.view(rows, -1, group), scale, zero_point, columns)


def integer_range(scheme: Scheme) -> tuple[int, int]:
    """Returns the smallest and the largest integer of a scheme."""
    if scheme.has_zero_point or scheme.group is not None:
        return 0, 2**scheme.bits - 1
    most = 2 ** (scheme.bits - 1) - 1
    return -most, most


def _offset(scheme: Scheme) -> int:
    """Returns the number that makes the integers of a scheme unsigned."""
    return 2 ** (scheme.bits - 1) if scheme.group is None and not scheme.has_zero_point else 0


def round_weight(
    weight: Float[Tensor, "out in"], scheme: Scheme, importance: Float[Tensor, " in"] | None = None
) -> Rounded:
    """Rounds a weight to the nearest integers of a scheme.

    Scales are rounded to bfloat16, which has float32's range, before integers are chosen.

    Args:
        weight: The weight.
        scheme: Bits, group and zero point.
        importance: Weight of each input's squared error, by which the range of each group is chosen, see
            `choose_ranges`; None: a range is that of the group's numbers.
    """
    step = max(1, ROUNDED_ELEMENTS // weight.shape[1])
    blocks = [_round_rows(rows, scheme, importance) for rows in weight.split(step)]
    integers, scales, points = (torch.cat(column) for column in zip(*blocks, strict=True))
    return Rounded(integers, scales, points, weight.shape[1])


ROUNDED_ELEMENTS = 1 << 24
"""Numbers of a weight that are rounded at once; copies take several times their memory."""


def _round_rows(rows: Tensor, scheme: Scheme, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    padded = by_groups(rows, scheme)
    scale, zero_point = choose_ranges(padded, scheme, None if importance is None else importance.expand_as(rows))
    return round_to(padded, scale, zero_point, scheme), scale, zero_point


def by_groups(weight: Float[Tensor, "out in"], scheme: Scheme) -> Float[Tensor, "out groups group"]:
    """Returns the numbers in float32 by groups, the last one filled up with zeros, which lie in every group's range."""
    rows, columns = weight.shape
    group = scheme.group or columns
    return nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)


def round_to(values: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Returns the nearest integers of a scheme, for scales and zero points that are chosen."""
    least, most = integer_range(scheme)
    if scheme.middle % 1:
        # Zero itself lies between two integers, so a group of zeros has the scale 0.
        return (values / torch.where(scale == 0, 1, scale) + zero_point).round().clamp(least, most)
    return ((values / scale).round() + zero_point).clamp(least, most)


FINEST = 8
"""Bits from which on a range is shrunk in few steps, and keeps its scale: a coarser scale is the larger error."""
SHRINKS = {8: 8}
"""Number of ranges that are tried for a group, by bits; 24 if not listed."""
SMALLEST_SHRINK = {8: 0.9, 6: 0.7, 5: 0.6, 4: 0.55}
"""Smallest tried range by bits, as a share of the whole range; 0.4 if not listed."""


def choose_ranges(
    padded: Float[Tensor, "out groups group"], scheme: Scheme, importance: Float[Tensor, "out in"] | None = None
) -> tuple[Float[Tensor, "out groups 1"], Float[Tensor, "out groups 1"]]:
    """Chooses the scale and the zero point of each group.

    With importance the range of the group's numbers is shrunk in steps, and the range with the least sum of
    `importance * error^2` is taken: a few clipped numbers cost less than a coarse grid for all others. Below 8 bits the
    scale of each tried range is the one that fits its integers best (least squares).

    Args:
        padded: From `by_groups`.
        scheme: Bits, group and zero point.
        importance: Of each number; None: the whole range is taken.
    """
    least, most = integer_range(scheme)
    low, high = padded.amin(-1, keepdim=True).clamp(max=0), padded.amax(-1, keepdim=True).clamp(min=0)
    # Without a zero point the farthest number gets the smallest integer, whatever its sign is: -8 of -8..7.
    reach = least - scheme.middle
    is_signed = scheme.group is not None and not scheme.middle % 1
    farthest = torch.where(high > -low, high, low) if is_signed else -torch.maximum(high, -low)

    def grid(share: float) -> tuple[Tensor, Tensor]:
        if not scheme.has_zero_point:
            scale = as_stored(share * farthest / reach, scheme)
            return scale, torch.full_like(scale, scheme.middle)
        scale = as_stored(share * (high - low) / most, scheme)
        return scale, (-share * low / scale).round().clamp(least, most)

    scale, zero_point = grid(1.0)
    if importance is None:
        return scale, zero_point
    heavy = by_groups(importance, scheme)

    def settle(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the scale that fits the integers of a range best, and the error."""
        steps = round_to(padded, scale, zero_point, scheme) - zero_point
        if scheme.bits < FINEST:
            weighted = heavy * steps
            energy = (weighted * steps).sum(-1, keepdim=True)
            fitted = (weighted * padded).sum(-1, keepdim=True) / energy
            scale = torch.where(energy > 0, as_stored(fitted, scheme), scale)
        return scale, ((scale * steps - padded).square_().mul_(heavy)).sum(-1, keepdim=True)

    scale, best = settle(scale, zero_point)
    steps, smallest = SHRINKS.get(scheme.bits, 24), SMALLEST_SHRINK.get(scheme.bits, 0.4)
    for step in range(1, steps + 1):
        whole, tried = grid(1.0 - step * (1.0 - smallest) / steps)
        fitted, cost = settle(whole, tried)
        better = cost < best
        best = torch.where(better, cost, best)
        scale = torch.where(better, fitted, scale)
        zero_point = torch.where(better, tried, zero_point)
    return scale, zero_point


def as_stored(scale: Tensor, scheme: Scheme) -> Tensor:
    """Returns scales as bfloat16 holds them, in float32; a scale of 0 becomes 1 where an integer stands for 0."""
    scale = scale.bfloat16().float()
    return scale if scheme.middle % 1 else torch.where(scale != 0, scale, 1.0)
