"""Distributions of new tokens, from temperature, top_k, top_p and min_p."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from refold.engine.buffer import Buffer
from refold.engine.columns import reduce_columns
from refold.generation.sampling import Sampling

_COLDEST = 1e-30
_PROBED_COLUMNS = (0.25, 1.0)
"""Shares of the columns whose likeliest tokens are sorted to find the border of top_p, before all tokens are."""


class Candidates(NamedTuple):
    """The tokens that may be drawn in some rows.

    Attributes:
        rows: Indices of the rows.
        ids: Token ids in ascending order, padded with 0; None: all tokens.
        weights: Probability of each divided by that of the likeliest; 0 for padding and tokens that are cut off.
    """

    rows: Int64[np.ndarray, " M"]
    ids: Int64[Tensor, "M C"] | None
    weights: Float[Tensor, "M C"]


class Distributions:
    """Settings of the distributions of the running choices.

    Args:
        max_rows: Most choices at a time.
        device: Device of the logits.

    Attributes:
        draws: Whether the tokens of each row are drawn.
    """

    draws: Bool[np.ndarray, " rows"]

    def __init__(self, max_rows: int, device: torch.device):
        self._device, self._picked, self._buffer = device, Buffer(device), Buffer(device)
        self.draws = np.zeros(max_rows, dtype=bool)
        self._temperature = np.ones(max_rows, dtype=np.float32)
        self._top_k = np.zeros(max_rows, dtype=np.int64)
        self._top_p = np.ones(max_rows)
        self._min_p = np.zeros(max_rows, dtype=np.float32)

    def set(self, row: int, sampling: Sampling) -> None:
        """Gives a row the settings of a choice."""
        self.draws[row] = sampling.temperature > 0
        # Within float32, whose range is smaller than that of Python's numbers.
        self._temperature[row] = min(max(sampling.temperature, _COLDEST), 1 / _COLDEST)
        self._top_k[row], self._top_p[row], self._min_p[row] = sampling.top_k, sampling.top_p, sampling.min_p

    def candidates(self, scores: Float[Tensor, "R N"], rows: Int64[np.ndarray, " R"]) -> list[Candidates]:
        """Returns the tokens that may be drawn, of all rows whose tokens are drawn, in a few groups.

        In transformers' order: temperature, top_k, top_p (of the mass that top_k leaves), min_p. Tokens with the same
        score as the last one kept are kept too. The group of a row depends on its own settings and scores alone.
        The weights are valid until the next call.

        Args:
            scores: Logits after bias and penalties.
            rows: Row of each.
        """
        drawn = np.flatnonzero(self.draws[rows])
        is_narrow = self._has_top_k(rows[drawn], scores.shape[1]) | (self._top_p[rows[drawn]] < 1)
        narrow, wide = drawn[is_narrow], drawn[~is_narrow]
        groups = []
        for share in _PROBED_COLUMNS:
            if len(narrow):
                found = self._narrow(self._pick(scores, narrow), rows[narrow], share)
                groups.append(found._replace(rows=narrow[found.rows]))
                # The others have a top_p that the candidates do not reach.
                narrow = np.delete(narrow, found.rows)
        wide = np.sort(np.concatenate((wide, narrow)))
        if len(wide):
            groups.append(Candidates(wide, None, self._wide(self._pick(scores, wide), rows[wide])))
        return [each for each in groups if len(each.rows)]

    def _narrow(self, scores: Tensor, rows: np.ndarray, share: float) -> Candidates:
        """Returns the candidates of the rows that have few, among those with top_k or top_p."""
        size, largest = scores.shape[1], scores.amax(dim=-1, keepdim=True)
        temperature, has_top_k = self._column(self._temperature, rows), self._has_top_k(rows, size)
        ids, values = _likely_tokens(scores, np.where(has_top_k, self._top_k[rows], 0), share)
        logarithms = (values - largest).div_(temperature)
        totals = torch.zeros(len(rows), dtype=torch.float64, device=self._device)
        open_ = self._tensor(np.flatnonzero(~has_top_k))
        if len(open_):
            totals[open_] = _sum(self._logarithms(scores, rows).exp_())[open_]
        floors, is_short = self._floors(logarithms, rows, totals)
        weights = torch.where(logarithms < floors, 0.0, logarithms.exp())
        weights = torch.where(weights < self._column(self._min_p, rows), 0.0, weights)
        enough = np.flatnonzero(~is_short.cpu().numpy())
        at = self._tensor(enough)
        return Candidates(enough, ids[at], weights[at])

    def _wide(self, scores: Tensor, rows: np.ndarray) -> Tensor:
        """Returns the weights of all tokens."""
        logarithms = self._logarithms(scores, rows)
        cut = np.flatnonzero(self._top_p[rows] < 1)
        if len(cut):
            at = self._tensor(cut)
            part = logarithms[at]
            floors, _ = self._floors(part, rows[cut], _sum(part.exp()))
            logarithms[at] = torch.where(part < floors, -torch.inf, part)
        weights = logarithms.exp_()
        if self._min_p[rows].any():
            weights.masked_fill_(weights < self._column(self._min_p, rows), 0.0)
        return weights

    def _floors(
        self, logarithms: Float[Tensor, "M C"], rows: np.ndarray, totals: Float64[Tensor, " M"]
    ) -> tuple[Float[Tensor, "M 1"], Bool[Tensor, " M"]]:
        """Returns the smallest logarithm of a weight that top_k and top_p keep, and whether more tokens are needed.

        Args:
            logarithms: Logarithms of weights, at least those of the largest.
            rows: Row of each.
            totals: Sum of all weights of a row without top_k.
        """
        ordered = _descending(logarithms)
        has_top_k = self._has_top_k(rows, ordered.shape[1] + 1)
        last = self._column(np.where(has_top_k, self._top_k[rows] - 1, ordered.shape[1] - 1), np.arange(len(rows)))
        is_open = self._column(~has_top_k, np.arange(len(rows)))
        kept = ordered >= ordered.gather(1, last)
        weights = torch.where(kept, ordered.double().exp(), 0.0)
        bounds = weights.cumsum(dim=-1)
        shares = self._column(np.where(self._top_p < 1, self._top_p, np.inf), rows)
        reach = shares * torch.where(is_open, totals[:, None], bounds[:, -1:])
        # A token is kept if the tokens before it have less than the share.
        kept &= bounds - weights < reach
        floors = ordered.gather(1, (kept.sum(dim=-1, keepdim=True) - 1).clamp(min=0))
        return floors, (is_open & (bounds[:, -1:] < reach))[:, 0]

    def _logarithms(self, scores: Tensor, rows: np.ndarray) -> Tensor:
        """Returns the logarithms of the weights before anything is cut off, in the buffer."""
        out = self._buffer.take(*scores.shape)
        torch.sub(scores, scores.amax(dim=-1, keepdim=True), out=out)
        return out.div_(self._column(self._temperature, rows))

    def _has_top_k(self, rows: np.ndarray, size: int) -> np.ndarray:
        return (self._top_k[rows] > 0) & (self._top_k[rows] < size)

    def _pick(self, scores: Tensor, chosen: np.ndarray) -> Tensor:
        if len(chosen) == len(scores):
            return scores
        out = self._picked.take(len(chosen), scores.shape[1])
        return torch.index_select(scores, 0, self._tensor(chosen), out=out)

    def _column(self, numbers: np.ndarray, rows: np.ndarray) -> Tensor:
        return self._tensor(numbers[rows])[:, None]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _likely_tokens(scores: Tensor, top_k: np.ndarray, share: float) -> tuple[Tensor, Tensor]:
    """Returns ids and scores of the likeliest tokens of each row, at least `top_k` of them.

    The k-th largest of the largest scores of columns is a bound: at least k tokens reach it.

    Args:
        scores: Logits.
        top_k: Number of tokens that are needed; 0: `share` of the number of columns.
        share: See `top_k`.
    """
    best = reduce_columns(scores, torch.amax)
    wanted = np.where(top_k > 0, top_k, max(1, int(best.shape[1] * share)))
    fitting = np.minimum(wanted, best.shape[1])
    places = torch.from_numpy(fitting - 1).to(scores.device)[:, None]
    bounds = best.topk(int(fitting.max()), dim=-1).values.gather(1, places)
    too_many = torch.from_numpy(wanted > best.shape[1]).to(scores.device)[:, None]
    bounds = bounds.masked_fill_(too_many, -torch.inf)
    row, token = (scores >= bounds).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(scores))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    longest = max(1, int(counts.max()))
    ids = torch.zeros(len(scores), longest, dtype=torch.int64, device=scores.device)
    values = torch.full((len(scores), longest), -torch.inf, device=scores.device)
    ids[row, place], values[row, place] = token, scores[row, token]
    return ids, values


def _sum(weights: Tensor) -> Tensor:
    """Returns the float64 sum of each row."""
    return reduce_columns(weights, torch.sum).sum(dim=-1, dtype=torch.float64)


def _descending(numbers: Tensor) -> Tensor:
    """Returns the numbers of each row in descending order."""
    if numbers.is_cuda:
        return numbers.sort(dim=-1, descending=True).values
    # On a CPU numpy sorts several times faster than torch.
    return torch.from_numpy(-np.sort(-numbers.numpy(), axis=-1))
