"""Rounding of matrices in blocks of 32, in the layout of ONNX Runtime's MatMulNBits."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

from refold.exporting.onnx.storage import BLOCK, BlockFormat

ROWS_AT_ONCE = 4096
"""Rows that are rounded together, which bounds the memory beside a large vocabulary."""
_STRETCHES = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 1.04, 1.08)
"""Factors on the scale that maps the number of largest magnitude to the end of the range. The best of them is taken."""


@dataclass(frozen=True)
class Blocks:
    """A rounded matrix.

    Attributes:
        packed: `[rows, blocks, bytes]`: integers plus `zero`; of 4 bits, the first of two neighbours is the low half.
        scales: `[rows, blocks]`.
    """

    packed: UInt8[Tensor, "rows blocks bytes"]
    scales: Float16[Tensor, "rows blocks"]


def round_blocks(weight: Float[Tensor, "rows columns"], format: BlockFormat) -> Blocks:
    """Rounds a matrix block by block; columns past the last whole block are padded by zeros.

    The scale of a block maps its number of largest magnitude to the negative end of the integers, as in llama.cpp's
    Q4_0. A few scales beside it are tried, and the one with the smallest squared error is taken.
    """
    pieces = [_round_rows(rows, format) for rows in weight.split(ROWS_AT_ONCE)]
    return Blocks(torch.cat([each.packed for each in pieces]), torch.cat([each.scales for each in pieces]))


def dequantise(blocks: Blocks, format: BlockFormat, num_columns: int) -> Float[Tensor, "rows columns"]:
    """Returns the float32 matrix that a rounded matrix stands for."""
    packed = blocks.packed
    if format.bits == 4:
        packed = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    values = (packed.float() - format.zero) * blocks.scales.float()[..., None]
    return values.flatten(1)[:, :num_columns]


def _round_rows(weight: Tensor, format: BlockFormat) -> Blocks:
    padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK))
    place = blocks.abs().argmax(dim=-1, keepdim=True)
    extreme = blocks.gather(-1, place)
    first, *others = _STRETCHES if format.bits == 4 else (1.0,)
    best = _Try(blocks, extreme * (first / -format.zero), format)
    for stretch in others:
        tried = _Try(blocks, extreme * (stretch / -format.zero), format)
        is_better = tried.missed < best.missed
        best.integers = torch.where(is_better, tried.integers, best.integers)
        best.missed = torch.where(is_better, tried.missed, best.missed)
        best.scale = torch.where(is_better, tried.scale, best.scale)
    return pack_blocks(best.integers, best.scale.squeeze(-1), format)


def pack_blocks(integers: Tensor, scales: Tensor, format: BlockFormat) -> Blocks:
    """Packs integers.

    Args:
        integers: `[rows, blocks, 32]`, signed whole numbers of any dtype.
        scales: `[rows, blocks]`.
        format: Width of the integers.
    """
    unsigned = (integers.to(torch.int16) + format.zero).to(torch.uint8)
    if format.bits == 4:
        pairs = unsigned.unflatten(-1, (-1, 2))
        unsigned = pairs[..., 0] | pairs[..., 1] << 4
    return Blocks(unsigned.contiguous(), scales.contiguous())


class _Try:
    """Blocks `[rows, blocks, 32]` rounded by scales `[rows, blocks, 1]`, and the squared error of each block."""

    def __init__(self, blocks: Tensor, scale: Tensor, format: BlockFormat):
        self.scale = scale.half()
        wide = self.scale.float()
        inverse = torch.where(wide == 0, 0.0, 1.0 / wide)
        self.integers = (blocks * inverse).round().clamp(-format.zero, format.zero - 1)
        self.missed = (self.integers * wide - blocks).square().sum(dim=-1, keepdim=True)
