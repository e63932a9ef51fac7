"""Softmax over a window of the latest tokens, not normalised, so that it can share a normaliser with other weights."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOWEST = -1e30
"""Score of a masked key: its weight becomes zero, and the score is far from overflow."""
TOKENS_AT_ONCE = 1024
"""Queries whose scores are held at the same time."""


def window_sums(
    query: Float[Tensor, "B T H K"],
    keys: Float[Tensor, "B S H K"],
    values: Float[Tensor, "B S H V"],
    seen: Bool[Tensor, "B T W"],
    window: int,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H 1"]]:
    """Returns the weighted sum of values and the sum of weights exp(score - highest score in the window), in float32.

    Token t sees the keys t + 1 to t + window (the last is its own), of those that `seen` allows. Without gradients,
    memory beyond inputs and outputs does not grow with T.

    Args:
        query: Queries, multiplied by the attention's scale.
        keys: Keys of the previous `window` tokens, then those of these tokens.
        values: Values in the same order.
        seen: Mask of each token's window, oldest first: true for keys that exist and are of the token's document. The
            token's own key is always true.
        window: W.
    """
    if torch.compiler.is_exporting():
        return _sum_unfolded(query, keys, values, seen, window)
    stride = max(window, TOKENS_AT_ONCE)
    pieces = [
        _sum_block_by_block(
            query[:, start : start + stride],
            keys[:, start : start + stride + window],
            values[:, start : start + stride + window],
            seen[:, start : start + stride],
            window,
        )
        for start in range(0, query.shape[1], stride)
    ]
    summed, weights = zip(*pieces, strict=True)
    return torch.cat(summed, dim=1), torch.cat(weights, dim=1)


def _sum_block_by_block(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    tokens, block = query.shape[1], min(window, query.shape[1])
    padded = -(-tokens // block) * block
    query = _pad(query.float(), padded - tokens)
    keys, values = _pad(keys.float(), padded - tokens), _pad(values.float(), padded - tokens)
    # [B, N, H, block, .] queries beside [B, N, H, window + block, .] keys.
    query = query.unflatten(1, (-1, block)).transpose(2, 3)
    near_keys, near_values = (
        states.unfold(1, window + block, block).permute(0, 1, 2, 4, 3) for states in (keys, values)
    )
    scores = query @ near_keys.transpose(-1, -2)
    # Row i sees the columns i + 1 to i + window of its block.
    rows = torch.arange(block, device=query.device)[:, None] + 1 + torch.arange(window, device=query.device)
    scores = scores.gather(-1, rows.expand(*scores.shape[:-1], window))
    allowed = torch.nn.functional.pad(seen, (0, 0, 0, padded - tokens)).unflatten(1, (-1, block)).unsqueeze(2)
    scores = torch.where(allowed, scores, LOWEST)
    weights = (scores - scores.amax(dim=-1, keepdim=True).detach()).exp()
    spread = torch.zeros(*weights.shape[:-1], window + block, device=weights.device, dtype=weights.dtype)
    spread = spread.scatter(-1, rows.expand_as(weights), weights)
    summed = (spread @ near_values).transpose(2, 3).flatten(1, 2)[:, :tokens]
    return summed, weights.sum(dim=-1, keepdim=True).transpose(2, 3).flatten(1, 2)[:, :tokens]


def _sum_unfolded(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, window: int
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H 1"]]:
    """Computes `window_sums` with a copy of the window for each token: no fixed number of blocks, but more memory."""
    near_keys, near_values = (states[:, 1:].float().unfold(1, window, 1) for states in (keys, values))
    scores = torch.einsum("bthk,bthkw->bthw", query.float(), near_keys)
    scores = torch.where(seen[:, :, None], scores, LOWEST)
    weights = (scores - scores.amax(dim=-1, keepdim=True).detach()).exp()
    return torch.einsum("bthw,bthvw->bthv", weights, near_values), weights.sum(dim=-1, keepdim=True)


def _pad(states: Tensor, missing: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, 0, 0, 0, missing)) if missing else states
