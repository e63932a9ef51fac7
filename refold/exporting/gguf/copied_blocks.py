"""Stored integers of a model as the blocks of a GGUF tensor, in the order of the tensor's rows."""

import torch

from refold.exporting.gguf.contents import GgufTensor, WeightPiece
from refold.exporting.gguf.row_order import place_rows
from refold.exporting.gguf.stored_formats import BITS
from refold.exporting.integer_blocks import IntegerBlocks
from refold.exporting.stack_weights import StackWeights
from refold.exporting.stored_schemes import BLOCK


def read_tensor_blocks(tensor: GgufTensor, name: str, weights: StackWeights) -> IntegerBlocks | None:
    """Returns the stored integers of a tensor in a format.

    Args:
        tensor: The tensor.
        name: Its format.
        weights: Reads the weights of the model.

    Returns:
        The blocks; None: the format has other integers, or a piece is no stored weight whose rows are only moved.
    """
    bits, found = BITS.get(name), []
    if bits is None:
        return None
    for piece in tensor.pieces:
        blocks = None if _changes_numbers(piece) else weights.read_blocks(piece.canonical, piece.depth, bits)
        if blocks is None:
            return None
        moved = IntegerBlocks(*(place_rows(piece, each) for each in blocks))
        found.append(_pad_blocks(moved, piece.columns // BLOCK))
    if not found:
        return None
    return IntegerBlocks(*(torch.cat(each) for each in zip(*found, strict=True)))


def encode_blocks(blocks: IntegerBlocks, name: str) -> memoryview:
    """Returns the bytes of blocks in a format: each has its scale, then 32 bytes (`q8_0`) or 16 (`q4_0`).

    A byte of `q4_0` holds the integers `j` and `j + 16` of a block plus 8, the first in its low half.
    """
    integers = blocks.integers
    if BITS[name] == 4:
        unsigned = (integers + 8).view(torch.uint8)
        low, high = unsigned.chunk(2, dim=-1)
        packed = low | high << 4
    else:
        packed = integers.view(torch.uint8)
    scales = blocks.scales.unsqueeze(-1).view(torch.uint8)
    return torch.cat((scales, packed), dim=-1).numpy().reshape(-1).data


def _changes_numbers(piece: WeightPiece) -> bool:
    return piece.negative_exp or bool(piece.offset) or piece.factor != 1.0


def _pad_blocks(blocks: IntegerBlocks, num_blocks: int) -> IntegerBlocks:
    missing = max(num_blocks - blocks.scales.shape[1], 0)
    integers = torch.nn.functional.pad(blocks.integers, (0, 0, 0, missing))
    return IntegerBlocks(integers, torch.nn.functional.pad(blocks.scales, (0, missing)))
