"""Canonical tensors put together as a family's checkpoints hold them: the inverse of reading pieces out of a source."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refold.families.family import Layout


def pack_pieces(layout: Layout, pieces: Sequence[Tensor], head_dim: int) -> Tensor:
    """Packs the canonical pieces of one source tensor.

    Args:
        layout: How the source tensor holds them.
        pieces: In the rule's order, weights `[rows, columns]` or biases `[rows]`.
        head_dim: Rows of one head, for `heads`.
    """
    if layout == "whole":
        (piece,) = pieces
        return piece
    if layout == "rows":
        return torch.cat(tuple(pieces))
    # [heads, pieces, head_dim] by rows, as GPT-NeoX packs query, key and value.
    return torch.stack([piece.unflatten(0, (-1, head_dim)) for piece in pieces], dim=1).flatten(0, 2)
