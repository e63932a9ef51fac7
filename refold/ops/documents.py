"""Documents packed in a row, as recurrences see them: states are emptied where one begins."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def number_documents(
    resets: Bool[Tensor, "B T"] | None, batch: int, tokens: int, device: torch.device
) -> Int[Tensor, "B T"]:
    """Returns for each token how many documents have begun in this row so far: 0 where the state at hand continues.

    Args:
        resets: Where a document begins, so that nothing from before may be seen; None: nowhere.
        batch: Rows.
        tokens: Tokens in a row.
        device: Where to make it.
    """
    if resets is None:
        return torch.zeros(batch, tokens, dtype=torch.long, device=device)
    return resets.long().cumsum(dim=1)


def within_documents(mixing: Float[Tensor, "B H T T"], resets: Bool[Tensor, "B T"] | None) -> Float[Tensor, "B H T T"]:
    """Returns what tokens take from tokens, with 0 between documents."""
    if resets is None:
        return mixing
    numbers = number_documents(resets, resets.shape[0], resets.shape[1], resets.device)
    return mixing.masked_fill((numbers[:, :, None] != numbers[:, None, :])[:, None], 0.0)
