"""Permutations and rotations that align tied layers, and the assignment problem behind them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refold.calibration.moments import MomentStore
from refold.calibration.weighting import Moments
from refold.sources.pieces import PieceReader

FIRST, LAST, STEP = 0.25, 1e-4, 5.0
"""Auction epsilon as a share of the range of scores: initial value, final value, divisor per round."""
BIDDERS = 1024
"""Rows that bid at once, which bounds the memory beside the scores."""


def assign(scores: Float[Tensor, "n n"]) -> Int[Tensor, " n"]:
    """Returns the column assigned to each row, each column once, with the largest sum of scores.

    Bertsekas's auction (Annals of Operations Research 14, 1988): rows without a column bid, many at once. Each bid
    raises the price of a column by the gain over the second best column plus epsilon. The sum is at most `LAST` times
    the range of scores, for each row, below the largest sum. The same scores give the same assignment.
    """
    size = len(scores)
    spread = float(scores.max() - scores.min())
    assert math.isfinite(spread), (
        "finite scores are required: with NaN no bid is the highest, and the auction would not end"
    )
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


@dataclass(frozen=True)
class HeadFrame:
    """A permutation of a layer's heads, and a rotation of the values of each key-value head.

    Attributes:
        queries: Index of the query head at each place; heads that read one key-value head stay together.
        key_values: Index of the key-value head at each place.
        turns: Orthogonal matrix at each place that values are multiplied by.
    """

    queries: Int[Tensor, " H"]
    key_values: Int[Tensor, " G"]
    turns: Float[Tensor, "G K K"]

    def order_queries(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (len(self.queries), -1))[self.queries].flatten(0, 1)

    def order_keys(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (len(self.key_values), -1))[self.key_values].flatten(0, 1)

    def turn_values(self, rows: Tensor) -> Tensor:
        return self._turn(self.order_keys(rows), self.turns)

    def turn_outputs(self, rows: Tensor) -> Tensor:
        """Permutes and rotates the heads' outputs, which the output projection reads."""
        groups = len(self.queries) // len(self.key_values)
        return self._turn(self.order_queries(rows), self.turns.repeat_interleave(groups, dim=0))

    @staticmethod
    def _turn(rows: Tensor, turns: Tensor) -> Tensor:
        heads = rows.unflatten(0, (len(turns), -1)).flatten(2) if rows.ndim > 1 else rows.view(len(turns), -1, 1)
        return torch.bmm(turns.to(rows), heads).flatten(0, 1).view(rows.shape)


@dataclass(frozen=True)
class LayerFrame:
    """Permutations and rotations that bring one layer into the frame of another.

    Attributes:
        neurons: Index of the MLP's neuron at each place; None: no permutation.
        heads: The attention's heads; None: no permutation or rotation.
    """

    neurons: Int[Tensor, " I"] | None = None
    heads: HeadFrame | None = None

    def outputs(self, owner: str, rows: Float[Tensor, "out *rest"]) -> Float[Tensor, "out *rest"]:
        """Brings the outputs of a linear or a norm, the first axis of `rows`, into the frame."""
        if owner in ("gate_proj", "up_proj") and self.neurons is not None:
            return rows[self.neurons]
        if self.heads is None:
            return rows
        if owner in ("q_proj", "k_proj"):
            return self.heads.order_queries(rows) if owner == "q_proj" else self.heads.order_keys(rows)
        if owner == "v_proj":
            return self.heads.turn_values(rows)
        # A norm over single heads has the same weight for all heads.
        head = self.heads.turns.shape[-1]
        if owner == "q_norm" and len(rows) != head:
            return self.heads.order_queries(rows)
        return self.heads.order_keys(rows) if owner == "k_norm" and len(rows) != head else rows

    def weight(self, linear: str, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Brings a linear's weight into the frame."""
        return self.inputs(linear, self.outputs(linear, weight).T).T.contiguous()

    def inputs(self, linear: str, rows: Float[Tensor, "in *rest"]) -> Float[Tensor, "in *rest"]:
        """Brings the inputs of a linear, the first axis of `rows`, into the frame."""
        if linear == "down_proj" and self.neurons is not None:
            return rows[self.neurons]
        return self.heads.turn_outputs(rows) if linear == "o_proj" and self.heads is not None else rows


class FramedPieces(PieceReader):
    """Reader of a source whose layers are brought into other frames; each layer computes the same function.

    Args:
        pieces: Reader of the source in its own frames.
        frames: Frame by layer.
    """

    def __init__(self, pieces: PieceReader, frames: dict[int, LayerFrame]):
        super().__init__(pieces.model, pieces.reader)
        self._frames = frames

    def read(self, canonical: str, layer: int | None, dtype: torch.dtype, repeat: int = 1) -> Tensor:
        frame = None if layer is None else self._frames.get(layer)
        if frame is None:
            return super().read(canonical, layer, dtype, repeat)
        _, owner, kind = canonical.split(".")
        found = super().read(canonical, layer, torch.float32, repeat)
        is_linear = kind == "weight" and found.ndim == 2
        return (frame.weight(owner, found) if is_linear else frame.outputs(owner, found)).to(dtype)


class FramedMoments(MomentStore):
    """Moments of a source whose layers are brought into other frames.

    Args:
        store: Moments in the source's own frames.
        frames: Frame by layer.
    """

    def __init__(self, store: MomentStore, frames: dict[int, LayerFrame]):
        super().__init__(store.folder, store.shrinkage)
        self._frames = frames

    def read_folds(self, layer: int, linear: str, shares: Sequence[float | int] | None = None) -> Moments:
        found, frame = super().read_folds(layer, linear, shares), self._frames.get(layer)
        if frame is None:
            return found
        outputs = found.outputs
        if outputs is not None:
            outputs = frame.outputs(linear, frame.outputs(linear, outputs).T).T.contiguous()
        return Moments(frame.inputs(linear, frame.inputs(linear, found.inputs).T).T.contiguous(), outputs)
