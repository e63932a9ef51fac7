"""Integers of few bits, packed into 32-bit words without gaps: the layout of compressed-tensors' `pack-quantized`."""

import torch
from jaxtyping import Int, Int32, UInt8
from torch import Tensor, nn

from refold.blueprint.integers import WORD_BITS

WORD_BYTES = 4


def pack_bits(integers: UInt8[Tensor, "rows columns"], bits: int) -> Int32[Tensor, "rows words"]:
    """Packs each row: integer i takes the bits `i * bits` up of the row, the lowest first; words are little-endian.

    Args:
        integers: From 0 to `2**bits - 1`.
        bits: 1 to 8.
    """
    if bits == 8:
        found = integers
    elif bits == 4:
        pairs = nn.functional.pad(integers, (0, integers.shape[1] % 2))
        found = pairs[:, ::2] | (pairs[:, 1::2] << 4)
    else:
        eights = nn.functional.pad(integers, (0, -integers.shape[1] % 8)).unflatten(1, (-1, 8))
        found = _regroup(eights, bits, 8, bits).flatten(1)[:, : -(-integers.shape[1] * bits // 8)]
    padded = nn.functional.pad(found, (0, -found.shape[1] % WORD_BYTES))
    # Flat, because the stride of a single row may be any number, which a view as words refuses.
    return padded.flatten().view(torch.int32).view(len(padded), -1)


def unpack_bits(words: Int32[Tensor, "rows words"], bits: int, columns: int) -> UInt8[Tensor, "rows columns"]:
    """Returns the integers that `pack_bits` packed.

    Args:
        words: The packed rows.
        bits: Bits of an integer.
        columns: Integers of a row.
    """
    stored = words.flatten().view(torch.uint8).view(len(words), -1)
    if bits == 8:
        return stored[:, :columns]
    if bits == 4:
        return torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1)[:, :columns]
    # Eight integers fill as many bytes as they have bits.
    padded = nn.functional.pad(stored, (0, -stored.shape[1] % bits)).unflatten(1, (-1, bits))
    return _regroup(padded, 8, bits, 8).flatten(1)[:, :columns]


def unpack_columns(
    words: Int32[Tensor, "rows words"], bits: int, columns: Int[Tensor, " some"]
) -> UInt8[Tensor, "rows some"]:
    """Returns some of the integers of each row.

    Args:
        words: The packed rows.
        bits: Bits of an integer.
        columns: Places of the integers in a row.
    """
    begins = columns * bits
    first = begins // WORD_BITS
    low = words[:, first].long() & (2**WORD_BITS - 1)
    # An integer may lie across two words.
    high = words[:, (first + 1).clamp(max=words.shape[1] - 1)].long() & (2**WORD_BITS - 1)
    return (((low | (high << WORD_BITS)) >> (begins % WORD_BITS)) & (2**bits - 1)).to(torch.uint8)


def _regroup(parts: UInt8[Tensor, "rows some parts"], width: int, new_width: int, count: int) -> Tensor:
    """Returns the bits of each group of numbers of `width` bits as `count` numbers of another width, uint8."""
    dtype = torch.int32 if parts.shape[-1] * width < WORD_BITS else torch.int64
    places = torch.arange(parts.shape[-1], device=parts.device) * width
    joined = (parts.to(dtype) << places.to(dtype)).sum(-1, keepdim=True, dtype=dtype)
    new_places = (torch.arange(count, device=parts.device) * new_width).to(dtype)
    return ((joined >> new_places) & (2**new_width - 1)).to(torch.uint8)
