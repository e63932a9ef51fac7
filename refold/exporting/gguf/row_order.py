"""Order of rows in GGUF tensors, for weights as well as for their integers and scales."""

import torch
from torch import Tensor

from refold.exporting.gguf.contents import WeightPiece


def pair_rows(value: Tensor, num_heads: int) -> Tensor:
    """Brings rows of heads from halves (i, i + d / 2) to pairs (2 i, 2 i + 1), the rotary order `norm` of llama.cpp."""
    return value.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def place_rows(piece: WeightPiece, value: Tensor) -> Tensor:
    """Takes, repeats and orders the rows of a weight, or of its integers or scales, and pads them with zeros."""
    if piece.span is not None:
        value = value[slice(*piece.span)]
    if piece.repeat is not None:
        heads, times = piece.repeat
        value = value.unflatten(0, (heads, -1)).repeat_interleave(times, 0).flatten(0, 1)
    if piece.rotary_heads:
        value = pair_rows(value, piece.rotary_heads)
    missing = max(piece.rows - value.shape[0], 0)
    return torch.cat((value, value.new_zeros(missing, *value.shape[1:]))) if missing else value
