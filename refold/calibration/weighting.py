"""Weightings of errors by second moments of inputs and gradients, and the targets of fits in sequence."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from refold.calibration.svd import SvdMode, Truncated, truncated_svd

INPUT_RIDGE, OUTPUT_RIDGE = 1e-2, 1e-1
"""Shares of the mean variance that are added to every direction, so that directions absent from the text count too.
Between 1e-3 and 1e-1 the losses of books-10m hardly change. Gradients need more, because there are fewer of them."""


class Moments(NamedTuple):
    """Uncentred second moments of one linear on text, means over tokens.

    Attributes:
        inputs: E[x x^T] of the inputs x.
        outputs: E[g g^T], with g the gradient of a token's loss with respect to the linear's output; None: unknown.
    """

    inputs: Float[Tensor, "in in"]
    outputs: Float[Tensor, "out out"] | None = None

    def shrink(self, strength: float) -> "Moments":
        """Returns both moments shrunk by the same strength."""
        return Moments(shrunk(self.inputs, strength), None if self.outputs is None else shrunk(self.outputs, strength))

    def to(self, device: str) -> "Moments":
        """Returns the moments on a device."""
        return Moments(self.inputs.to(device), None if self.outputs is None else self.outputs.to(device))

    def error(self, change: Float[Tensor, "out in"]) -> float:
        """Returns the expected error of a changed weight, in float64.

        With gradients 0.5 tr(G D C D^T): the estimated change of the loss, in nats for each token. Without them
        tr(D C D^T): the mean squared error of the outputs.
        """
        wide = change.double()
        by_inputs = wide @ self.inputs.double()
        if self.outputs is None:
            return float((by_inputs * wide).sum())
        return 0.5 * float((by_inputs * (self.outputs.double() @ wide)).sum())


def shrunk(moment: Float[Tensor, "*F n n"], strength: float) -> Float[Tensor, "*F n n"]:
    """Returns (1 - s) C + s tr(C)/n I for a moment C and a strength s from 0 to 1.

    A linear shrinkage of a covariance towards a multiple of the identity (Ledoit and Wolf 2004), which keeps the trace.
    With s = 1 a fit is that of the weights alone, with s = 0 that of this text alone.
    """
    if not strength:
        return moment
    mean = moment.diagonal(dim1=-2, dim2=-1).double().mean(dim=-1).to(moment.dtype)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return (1 - strength) * moment + strength * mean[..., None, None] * eye


class Weighting:
    """The norm |T E S|^2 of an error E `[out, in]`, with S S^T = C and T^T T = G.

    C is the second moment of the inputs and |E S|^2 the mean squared error of the outputs (SVD-LLM, arXiv 2403.07378);
    with G, the second moment of the loss's gradients, the norm is a second-order estimate of the change of the loss by
    E, with the Fisher matrix as a Kronecker product (arXiv 1503.05671). Without both it is the Frobenius norm.

    Args:
        inputs: C, with its ridge; None: the identity.
        outputs: G, with its ridge; None: the identity.
    """

    def __init__(self, inputs: Float[Tensor, "in in"] | None = None, outputs: Float[Tensor, "out out"] | None = None):
        self.inputs, self.outputs = inputs, outputs
        self._right = None if inputs is None else torch.linalg.cholesky(inputs.double())
        self._left = None if outputs is None else torch.linalg.cholesky(outputs.double()).T.contiguous()

    @property
    def is_plain(self) -> bool:
        """Whether the norm is the Frobenius norm."""
        return self._right is None and self._left is None

    def apply(self, matrix: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Returns T M S in float32."""
        if self.is_plain:
            return matrix
        wide = matrix.double()
        wide = wide if self._right is None else wide @ self._right
        return (wide if self._left is None else self._left @ wide).float()

    def energy(self, matrix: Float[Tensor, "out in"]) -> float:
        """Returns |T M S|^2."""
        return float(torch.linalg.vector_norm(self.apply(matrix), dtype=torch.float64).square())

    def spectrum(self, matrix: Float[Tensor, "out in"]) -> Float[Tensor, " smaller"]:
        """Returns the squared singular values of T M S, descending, in float64."""
        wide = self.apply(matrix).double()
        gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
        return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)

    def truncate(self, matrix: Float[Tensor, "out in"], rank: int, svd: SvdMode, seed: int) -> Truncated:
        """Returns the nearest matrix of a rank in this norm, T^-1 SVD_rank(T M S) S^-1, as factors.

        Columns of `v` have length 1. Except in the Frobenius norm, columns of `u` and `v` are not orthogonal.
        """
        found = truncated_svd(self.apply(matrix), rank, svd, seed)
        if self.is_plain:
            return found
        u, v = found.u.double(), found.v.double()
        if self._left is not None:
            u = torch.linalg.solve_triangular(self._left, u, upper=True)
        if self._right is not None:
            v = torch.linalg.solve_triangular(self._right.T, v, upper=True)
        lengths = torch.linalg.vector_norm(v, dim=0).clamp(min=torch.finfo(torch.float64).tiny)
        share = found.kept
        # The kept share is that of this norm, so the energy is scaled to give the same share of the new values.
        scaled = (found.s.double() * lengths).float()
        energy = float(scaled.double().square().sum()) / share if share > 0 else 0.0
        return Truncated(u.float(), scaled, (v / lengths).float(), energy)


def ridged(moment: Float[Tensor, "n n"], share: float) -> Float[Tensor, "n n"]:
    """Returns a moment plus a share of its mean variance in every direction; a zero moment becomes the identity."""
    wide = moment.double()
    mean = float(wide.diagonal().mean())
    if mean <= 0:
        return torch.eye(len(wide), dtype=torch.float64, device=wide.device)
    found = (wide + wide.T).div_(2)
    found.diagonal().add_(share * mean)
    return found


def parallel_sum(
    one: Float[Tensor, "n n"] | None, other: Float[Tensor, "n n"] | None, like: Tensor
) -> Float[Tensor, "n n"]:
    """Returns (A^-1 + B^-1)^-1, which weights the difference of two tied weights; None stands for the identity."""
    eye = torch.eye(like.shape[1], dtype=torch.float64, device=like.device)
    first, second = (eye if each is None else each.double() for each in (one, other))
    # A (A + B)^-1 B is equal, with one inverse of a matrix that is better conditioned than A and B.
    found = first @ torch.linalg.solve(first + second, second)
    return (found + found.T) / 2


class Drift(NamedTuple):
    """Inputs of a linear in a folded model compared with its inputs in the source, on the same tokens.

    Attributes:
        inputs: Sum of x x^T over tokens, with x the input in the folded model.
        drift: Sum of (x_source - x) x^T over tokens.
        tokens: Number of tokens.
    """

    inputs: Float[Tensor, "in in"]
    drift: Float[Tensor, "in in"]
    tokens: int

    def __add__(self, other: "Drift") -> "Drift":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Drift(self.inputs + other.inputs, self.drift + other.drift, self.tokens + other.tokens)

    def moment(self, strength: float = 0.0) -> Float[Tensor, "in in"]:
        """Returns E[x x^T] with its ridge, shrunk by a strength."""
        return ridged(shrunk(self.inputs / self.tokens, strength), INPUT_RIDGE)

    def correction(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Returns the M with the least E|W x_source - (W + M) x|^2 + |M R|^2, where R R^T is the ridge, in float64."""
        moved = weight.double() @ (self.drift.double() / self.tokens)
        return torch.linalg.solve(self.moment(), moved.T).T


def drift_between(source: Float[Tensor, "*batch in"], folded: Float[Tensor, "*batch in"]) -> Drift:
    """Compares the inputs of a linear in the source and in the folded model on the same tokens."""
    theirs, ours = source.flatten(0, -2), folded.flatten(0, -2)
    return Drift(ours.T @ ours, (theirs - ours).T @ ours, len(ours))


def aimed_weight(weight: Float[Tensor, "out in"], drifts: tuple[Drift, Drift]) -> Float[Tensor, "out in"]:
    """Returns the weight whose outputs, on the folded model's inputs, are nearest to the source's outputs.

    A little text overfits inputs of many dimensions. So the correction of each half of the text is tested on the other
    half, and only the share that helps there is applied.

    Args:
        weight: Weight of the linear in the source.
        drifts: Comparisons of inputs on two halves of the text.
    """
    gained = spent = 0.0
    for one, other in (drifts, drifts[::-1]):
        found = one.correction(weight)
        gained += float((weight.double() @ other.drift.double() * found).sum()) / other.tokens
        spent += float((found @ other.inputs.double() * found).sum()) / other.tokens
    share = min(1.0, max(0.0, gained / spent)) if spent > 0 else 0.0
    return (weight + share * (drifts[0] + drifts[1]).correction(weight)).float()
