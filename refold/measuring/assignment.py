"""Which row goes with which column: the assignment with the largest sum of scores."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

FIRST, LAST, STEP = 0.25, 1e-4, 5.0
"""Least raise of a bid, as a share of the scores' spread: at first, in the end, and what it is divided by between."""
BIDDERS = 1024
"""So many rows bid at once, which bounds what is in memory beside the scores."""


def assign(scores: Float[Tensor, "n n"]) -> Int[Tensor, " n"]:
    """Returns for each row its column, each column once, so that the scores' sum is largest.

    Bertsekas's auction (Annals of Operations Research 14, 1988): rows that have none bid for columns, many at once, and
    each bid raises a price by the gain over the second best and a little more. The sum is within `LAST` of the spread
    for each row of the largest there is. The same scores give the same assignment.
    """
    size = len(scores)
    spread = float(scores.max() - scores.min())
    assert math.isfinite(spread), "no bid is the highest among others that are no numbers: the auction would not end"
    if size == 1 or spread == 0:
        return torch.arange(size, device=scores.device)
    prices = torch.zeros(size, dtype=torch.float64, device=scores.device)
    raise_ = FIRST
    while True:
        found = _auction(scores, prices, raise_ * spread)
        if raise_ <= LAST:
            return found
        raise_ = max(LAST, raise_ / STEP)


def _auction(scores: Tensor, prices: Tensor, least: float) -> Tensor:
    """Assigns all rows; prices are raised in place."""
    size = len(scores)
    column_of, owner_of = (torch.full((size,), -1, dtype=torch.long, device=scores.device) for _ in range(2))
    while len(rows := (column_of < 0).nonzero().flatten()[:BIDDERS]):
        best = (scores[rows] - prices).topk(2, dim=1)
        wanted, bids = best.indices[:, 0], best.values[:, 0] - best.values[:, 1] + least
        highest = torch.full_like(prices, -torch.inf).scatter_reduce(0, wanted, bids, "amax")
        is_highest = bids == highest[wanted]
        winner = torch.full_like(owner_of, size).scatter_reduce(0, wanted[is_highest], rows[is_highest], "amin")
        sold = (winner < size).nonzero().flatten()
        ousted = owner_of[sold]
        column_of[ousted[ousted >= 0]] = -1
        owner_of[sold] = winner[sold]
        column_of[winner[sold]] = sold
        prices[sold] += highest[sold]
    return column_of
