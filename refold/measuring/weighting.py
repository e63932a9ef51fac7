"""By what the error of a linear's weight is measured: its entries, its outputs on text, or what they do to the loss."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from refold.measuring.svd import SvdMode, Truncated, truncated_svd

INPUT_RIDGE, OUTPUT_RIDGE = 1e-2, 1e-1
"""Shares of the mean variance added to every direction, so that none is free for what the text did not show. Between
1e-3 and 1e-1 the losses of books-10m hardly move; gradients are rarer than inputs, and need more."""


class Moments(NamedTuple):
    """Second moments of one linear on text, uncentred, means over tokens.

    Attributes:
        inputs: E[x x^T].
        outputs: E[g g^T], with g the gradient of a token's loss with respect to the linear's output; None: unknown.
    """

    inputs: Float[Tensor, "in in"]
    outputs: Float[Tensor, "out out"] | None = None


class Weighting:
    """The norm |T E S|^2 of an error E `[out, in]`, with S S^T = C and T^T T = G.

    C is the second moment of the inputs and |E S|^2 the mean squared error of the outputs (SVD-LLM, arXiv 2403.07378);
    with G, the second moment of the loss's gradients, it is a second-order estimate of what E does to the loss, with
    the Fisher matrix as a Kronecker product (arXiv 1503.05671). Without either it is the Frobenius norm.

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
        """Whether it is the Frobenius norm."""
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
        """Returns the matrix of a rank that is nearest in this norm, T^-1 SVD_rank(T M S) S^-1, as factors.

        Columns of `v` have length 1; in other norms than Frobenius's neither they nor those of `u` are orthogonal.
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
        # What is kept is said in this norm, so the energy is scaled to give the same share of the new numbers.
        scaled = (found.s.double() * lengths).float()
        energy = float(scaled.double().square().sum()) / share if share > 0 else 0.0
        return Truncated(u.float(), scaled, (v / lengths).float(), energy)


def ridged(moment: Float[Tensor, "n n"], share: float) -> Float[Tensor, "n n"]:
    """Adds a share of the mean variance to every direction; a moment of zeros becomes the identity."""
    wide = moment.double()
    mean = float(wide.diagonal().mean())
    if mean <= 0:
        return torch.eye(len(wide), dtype=torch.float64, device=wide.device)
    return (wide + wide.T) / 2 + share * mean * torch.eye(len(wide), dtype=torch.float64, device=wide.device)


def parallel_sum(
    one: Float[Tensor, "n n"] | None, other: Float[Tensor, "n n"] | None, like: Tensor
) -> Float[Tensor, "n n"]:
    """Returns (A^-1 + B^-1)^-1, for what two members of a tie may differ in; None stands for the identity of `like`."""
    eye = torch.eye(like.shape[1], dtype=torch.float64, device=like.device)
    first, second = (eye if each is None else each.double() for each in (one, other))
    # A (A + B)^-1 B is the same, with one inverse of a matrix that is better conditioned than either.
    found = first @ torch.linalg.solve(first + second, second)
    return (found + found.T) / 2
