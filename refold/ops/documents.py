"""Documents packed in a row, for recurrences, which set their state to zero at the first token of each document."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def number_documents(
    resets: Bool[Tensor, "B T"] | None, batch: int, tokens: int, device: torch.device
) -> Int[Tensor, "B T"]:
    """Returns, for each token, the number of documents that have begun in its row; 0: the document of the given state.

    Args:
        resets: True for the first token of a document, which does not see earlier tokens; None: no document begins.
        batch: Rows.
        tokens: Tokens in a row.
        device: Device of the result.
    """
    if resets is None:
        return torch.zeros(batch, tokens, dtype=torch.long, device=device)
    return resets.long().cumsum(dim=1)


def within_documents(mixing: Float[Tensor, "B H T T"], resets: Bool[Tensor, "B T"] | None) -> Float[Tensor, "B H T T"]:
    """Returns token-mixing matrices with 0 between tokens of different documents."""
    if resets is None:
        return mixing
    numbers = number_documents(resets, resets.shape[0], resets.shape[1], resets.device)
    return mixing.masked_fill((numbers[:, :, None] != numbers[:, None, :])[:, None], 0.0)
