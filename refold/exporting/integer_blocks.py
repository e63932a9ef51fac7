"""Integers of a quantised weight in blocks of 32 with float16 scales, as GGUF and ONNX Runtime store them."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float16, Int8
from torch import Tensor

from refold.exporting.stored_schemes import BLOCK
from refold.nn.rounding import Rounded

SMALLEST_SCALE_STEP = 2.0**-24
"""Distance of neighbouring float16 numbers at zero."""


class IntegerBlocks(NamedTuple):
    """A weight as `scale * integer`, block by block.

    Attributes:
        integers: Signed; columns past the last whole block are padded by zeros.
        scales: One for each block.
    """

    integers: Int8[Tensor, "rows blocks block"]
    scales: Float16[Tensor, "rows blocks"]

    def dequantise(self, columns: int) -> Float[Tensor, "rows columns"]:
        """Returns the weight in float32."""
        return (self.integers.float() * self.scales.float().unsqueeze(-1)).flatten(1)[:, :columns]


def to_blocks(rounded: Rounded) -> IntegerBlocks | None:
    """Returns the same integers in blocks; a scale of a group or row becomes that of all its blocks.

    float16 has more digits than bfloat16 and a smaller range. Scales near zero are rounded to its smallest step.

    Args:
        rounded: Integers whose scheme fits blocks, see `holds`.

    Returns:
        The blocks; None: a scale is too large for float16.
    """
    # Values of 2 bits lie half a step beside the integers: at half the scale they are odd integers.
    halved = 2 if bool((rounded.zero_point % 1 != 0).any()) else 1
    wide = rounded.scale[..., 0] / halved
    narrow = wide.half()
    if not bool(((narrow.float() - wide).abs() <= SMALLEST_SCALE_STEP / 2).all()):
        return None
    rows, groups, group = rounded.integers.shape
    signed = ((rounded.integers - rounded.zero_point) * halved).to(torch.int8).reshape(rows, -1)[:, : rounded.columns]
    integers = torch.nn.functional.pad(signed, (0, -rounded.columns % BLOCK)).unflatten(1, (-1, BLOCK))
    num_blocks = integers.shape[1]
    per_group = num_blocks if groups == 1 else group // BLOCK
    return IntegerBlocks(integers, narrow.repeat_interleave(per_group, 1)[:, :num_blocks].contiguous())
