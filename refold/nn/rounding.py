"""Rounding of a weight to the integers of a weight-only quantisation scheme."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refold.blueprint.quantisation import Scheme


class Rounded(NamedTuple):
    """Integers of a weight and the numbers that turn them back: `scale * (integer - zero_point)`.

    The last axis of the integers is filled up with the integer of zero until it holds whole groups.

    Attributes:
        integers: `[out, groups, group]`, whole numbers in float32.
        scale: `[out, groups, 1]`, float32 numbers that bfloat16 holds exactly.
        zero_point: `[out, groups, 1]`, whole numbers in float32; zeros in a symmetric scheme.
        columns: Length of a row of the weight.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    columns: int

    def dequantise(self) -> Float[Tensor, "out in"]:
        """Returns the weight that the integers stand for, in float32."""
        weight = self.scale * (self.integers - self.zero_point)
        return weight.view(len(weight), -1)[:, : self.columns]


def round_weight(weight: Float[Tensor, "out in"], scheme: Scheme) -> Rounded:
    """Rounds a weight to the nearest integers of a scheme; no text calibrates the rounding.

    Scales are rounded to bfloat16, which has float32's range, before integers are chosen.
    """
    rows, columns = weight.shape
    group = scheme.group or columns
    # Zeros change no group's range: zero lies in every range.
    padded = nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
    if scheme.has_zero_point:
        least, most = 0, 2**scheme.bits - 1
        low, high = padded.amin(-1, keepdim=True).clamp(max=0), padded.amax(-1, keepdim=True).clamp(min=0)
        scale = _as_stored((high - low) / most)
        zero_point = (-low / scale).round().clamp(least, most)
    else:
        most = 2 ** (scheme.bits - 1) - 1
        least = -most
        scale = _as_stored(padded.abs().amax(-1, keepdim=True) / most)
        zero_point = torch.zeros_like(scale)
    integers = ((padded / scale).round() + zero_point).clamp(least, most)
    return Rounded(integers, scale, zero_point, columns)


def _as_stored(scale: Tensor) -> Tensor:
    scale = scale.bfloat16().float()
    return torch.where(scale > 0, scale, 1.0)
