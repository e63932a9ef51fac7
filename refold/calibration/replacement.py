"""The linear map that stands in for dropped parts: its closed form, its check on halves, and the loss that it saves."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Shares of the mean variance that are tried as a ridge; the one with the least error on the other half is taken."""
NORM_EPSILON = 1e-6
ROWS_AT_ONCE = 4096
"""Tokens whose products are summed in float32 before they are added to float64 sums."""


class LinearMap(NamedTuple):
    """A linear map T of the update of the part before dropped parts.

    Attributes:
        matrix: T `[D, D]`, or the diagonal of T `[D]`; float32.
        kept: Share of the dropped parts' energy that T restores, checked on tokens that T was not fitted to; 0: T is
            the identity, because no map is better on these tokens.
        ridge: The ridge as a share of the mean variance; 0 for the identity.
    """

    matrix: Float[Tensor, "*rows D"]
    kept: float
    ridge: float


class ReplacementLoss(NamedTuple):
    """Predicted losses of dropping a part, in nats per token.

    Attributes:
        dropped: Without a replacement.
        replaced: With a linear map in its place, checked on tokens that the map was not fitted to.
        kept: Share of the part's energy that the map restores, on the same tokens.
    """

    dropped: float
    replaced: float
    kept: float


class _HalfSums:
    """Sums over the tokens of one half: m m^T, d m^T and |d|^2, float64; the diagonals of the first two on request."""

    def __init__(self, size: int, is_diagonal: bool):
        shape = (size,) if is_diagonal else (size, size)
        self.inputs, self.crossed = torch.zeros(2, *shape, dtype=torch.float64)
        self.energy, self.weight = 0.0, 0.0

    def plus(self, other: "_HalfSums") -> "_HalfSums":
        """Returns the sums of both halves."""
        found = _HalfSums(len(self.inputs), self.inputs.ndim == 1)
        found.inputs, found.crossed = self.inputs + other.inputs, self.crossed + other.crossed
        found.energy, found.weight = self.energy + other.energy, self.weight + other.weight
        return found

    def error(self, change: Tensor) -> float:
        """Returns the summed squared error of the change `T - I` on the tokens of this half."""
        explained = 2 * (change * self.crossed).sum()
        moved = change.square() * self.inputs if change.ndim == 1 else (change @ self.inputs) * change
        return self.energy - float(explained - moved.sum())


class _Solver:
    """Solves the ridge regression of one set of sums for any ridge, by one eigendecomposition."""

    def __init__(self, sums: _HalfSums):
        self._crossed = sums.crossed
        if sums.inputs.ndim == 1:
            self._values, self._vectors = sums.inputs, None
        else:
            self._values, self._vectors = torch.linalg.eigh(sums.inputs)
        self._values = self._values.clamp(min=0)
        self._mean = self._values.mean().clamp(min=torch.finfo(torch.float64).tiny)

    def change(self, ridge: float) -> Tensor:
        """Returns `T - I`."""
        scale = 1 / (self._values + ridge * self._mean)
        if self._vectors is None:
            return self._crossed * scale
        return (self._crossed @ self._vectors * scale) @ self._vectors.T


class MapSums:
    """Sums over calibration text from which the map in place of dropped parts is solved.

    With m the update of the part before the dropped parts and d the sum of their updates, the stream after them is
    approached by T m in place of m, T = I + E[d m^T] (E[m m^T] + r I)^-1: the least squares of ReplaceMe (arXiv
    2505.02819, equation 5, where T acts on the output of an MLP), with a ridge r towards plain dropping. A second
    moment of gradients that weights all tokens alike would cancel in this solution, so there is none. The ridge is the
    one of `RIDGES` whose map, fitted to one half of the tokens, has the least error on the other.

    Args:
        size: D.
        is_diagonal: Whether T is diagonal, because an output norm stands between the projection and the stream.
    """

    def __init__(self, size: int, is_diagonal: bool = False):
        self._is_diagonal = is_diagonal
        self._halves = (_HalfSums(size, is_diagonal), _HalfSums(size, is_diagonal))

    def add(
        self,
        half: int,
        before: Float[Tensor, "S D"],
        target: Float[Tensor, "S D"],
        weights: Float[Tensor, " S"] | None = None,
    ) -> None:
        """Adds tokens to one half.

        Args:
            half: 0 or 1; all tokens of one sequence belong to one half.
            before: Updates m of the part before the dropped parts.
            target: Sums d of the updates of the dropped parts.
            weights: Weight of each token; None: 1.
        """
        sums = self._halves[half]
        for first in range(0, len(before), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            m, d = before[rows].float(), target[rows].float()
            if weights is not None:
                root = weights[rows].float().sqrt()[:, None]
                m, d = m * root, d * root
            sums.inputs += m.square().sum(dim=0) if self._is_diagonal else m.T @ m
            sums.crossed += (d * m).sum(dim=0) if self._is_diagonal else d.T @ m
            sums.energy += float(d.double().square().sum())

    def choose_ridge(self) -> tuple[float, float, tuple[Tensor, Tensor]]:
        """Returns the ridge, the kept share of energy, and `T - I` fitted to each half, all checked on the other half.

        A ridge of 0 stands for `T = I`.
        """
        energy = sum(half.energy for half in self._halves)
        nothing = torch.zeros_like(self._halves[0].crossed)
        best = (0.0, 0.0, (nothing, nothing))
        solvers = [_Solver(half) for half in self._halves]
        for ridge in RIDGES if energy else ():
            changes = (solvers[0].change(ridge), solvers[1].change(ridge))
            error = sum(half.error(change) for half, change in zip(self._halves, reversed(changes), strict=True))
            if 1 - error / energy > best[1]:
                best = (ridge, 1 - error / energy, changes)
        return best

    def fit(self) -> LinearMap:
        """Returns the map that is fitted to all tokens, with the ridge that the halves choose."""
        ridge, kept, changes = self.choose_ridge()
        change = _Solver(self._halves[0].plus(self._halves[1])).change(ridge) if ridge else changes[0]
        matrix = change + (1 if self._is_diagonal else torch.eye(len(change), dtype=change.dtype))
        return LinearMap(matrix.float(), kept, ridge)


def token_weights(stream: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens"]:
    """Returns the weight of each token's error: one by the mean square of the stream, by which readers divide it."""
    return 1 / (stream.float().square().mean(dim=-1) + NORM_EPSILON)


def predict_replacement(
    before: Float[Tensor, "S D"],
    stream: Float[Tensor, "S D"],
    update: Float[Tensor, "S D"],
    gradients: Float[Tensor, "S D"],
    sequences: Int[Tensor, " S"],
    is_diagonal: bool = False,
) -> ReplacementLoss:
    """Predicts the loss of dropping a part with and without a linear map in its place.

    The loss of an error e of the stream after the part is E[(g . e)^2] / 2. The map is fitted to the tokens of one half
    of the sequences and its loss is measured on the other half, both ways, so that few tokens do not flatter it.

    Args:
        before: Update of the part before, at the same tokens as all others.
        stream: Residual stream that the dropped part reads.
        update: Update of the dropped part.
        gradients: Gradient of each token's loss with respect to the stream after the dropped part, with labels drawn
            from the model's predictions.
        sequences: Sequence of each token.
        is_diagonal: As for `MapSums`.
    """
    assert len(before) == len(stream) == len(update) == len(gradients)
    half = halve(sequences)
    weights = token_weights(stream + update)
    sums = MapSums(before.shape[1], is_diagonal)
    for index in range(2):
        rows = half == index
        sums.add(index, before[rows], update[rows], weights[rows])
    _, kept, changes = sums.choose_ridge()
    replaced = 0.0
    for index, change in enumerate(reversed(changes)):
        rows = half == index
        m, d = before[rows].double(), update[rows].double()
        error = d - (m * change if is_diagonal else m @ change.T)
        replaced += float((gradients[rows].double() * error).sum(dim=-1).square().sum())
    dropped = float((gradients.double() * update.double()).sum(dim=-1).square().sum())
    return ReplacementLoss(dropped / (2 * len(update)), replaced / (2 * len(update)), kept)


def halve(sequences: Int[Tensor, " S"]) -> Int[Tensor, " S"]:
    """Returns 0 or 1 for each token: a random half of the sequences, always the same, or the halves of a single one.

    Kinds of text may alternate, so that every other sequence would be no fair half.

    Args:
        sequences: Sequence of each token.
    """
    names, places = sequences.unique(return_inverse=True)
    if len(names) == 1:
        return (torch.arange(len(sequences)) >= len(sequences) // 2).long()
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    return (order < len(names) // 2).long()[places]
