"""Truncated singular value decomposition, by the Gram matrix or by block Krylov iteration."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

SvdMode = Literal["auto", "exact"]

SHORT = 512
"""Smaller side of a matrix up to which the eigenproblem of its Gram matrix takes milliseconds."""
OVERSAMPLE = 8
GAIN = 0.01
"""Relative gain of kept energy below which the Krylov space grows no further."""


@dataclass(frozen=True)
class Truncated:
    """The first `rank` singular triples: matrix ~ u diag(s) v^T.

    Attributes:
        u: `[rows, rank]`, orthonormal columns.
        s: `[rank]`, descending.
        v: `[columns, rank]`, orthonormal columns.
        energy: Squared Frobenius norm of the whole matrix.
    """

    u: Float[Tensor, "rows rank"]
    s: Float[Tensor, " rank"]
    v: Float[Tensor, "columns rank"]
    energy: float

    @property
    def kept(self) -> float:
        """Share of the squared Frobenius norm that these triples keep (1 for a zero matrix)."""
        return min(1.0, float(self.s.double().square().sum()) / self.energy) if self.energy > 0 else 1.0

    def take(self, triples: Tensor | slice) -> "Truncated":
        """Returns a selection of the triples."""
        return Truncated(self.u[:, triples], self.s[triples], self.v[:, triples], self.energy)

    def project(self, matrix: Float[Tensor, "rows columns"]) -> "Truncated":
        """Projects another matrix, with nearly the same singular vectors, on the vectors of the shorter side.

        At full rank the result is the matrix itself. Vectors of the longer side are only nearly orthogonal.
        """
        by_rows = matrix.shape[0] <= matrix.shape[1]
        scaled = matrix.T @ self.u if by_rows else matrix @ self.v
        s = torch.linalg.vector_norm(scaled, dim=0)
        turned = scaled / s.clamp(min=torch.finfo(s.dtype).tiny)
        energy = float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
        return Truncated(self.u, s, turned, energy) if by_rows else Truncated(turned, s, self.v, energy)

    def factors(self) -> tuple[Float[Tensor, "rank columns"], Float[Tensor, "rows rank"]]:
        """Returns A = V^T and B = U S of arXiv 2410.20672, section 2.3, so that B A is the truncated matrix."""
        return self.v.T.contiguous(), self.u * self.s

    def matrix(self) -> Float[Tensor, "rows columns"]:
        return (self.u * self.s) @ self.v.T


def truncated_svd(matrix: Float[Tensor, "rows columns"], rank: int, mode: SvdMode = "auto", seed: int = 0) -> Truncated:
    """Returns the leading singular triples of a float32 matrix.

    `exact` is LAPACK's divide and conquer. `auto` takes the left vectors from the Gram matrix M M^T if the smaller side
    is at most 512 or the rank above a third of it. Otherwise it uses block Krylov iteration (Musco and Musco,
    arXiv 1504.05477): the space spanned by G, (M M^T) G, (M M^T)^2 G, ... for a Gaussian block G grows until the kept
    energy gains less than `GAIN`. Right vectors and singular values follow from M^T u, so that u s v^T is the
    projection u u^T M.

    Args:
        matrix: float32.
        rank: Number of triples, at most the smaller side.
        mode: `auto` or `exact`.
        seed: Seed of the Gaussian block; results are reproducible on one machine.
    """
    smaller = min(matrix.shape)
    assert 0 < rank <= smaller, (rank, matrix.shape)
    assert matrix.dtype == torch.float32
    # By rows, because a float64 norm of the whole matrix would take a tenth of the decomposition's time.
    energy = float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
    if mode == "exact":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return Truncated(u[:, :rank].clone(), s[:rank].clone(), vh[:rank].T.contiguous(), energy)
    turned = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if turned else matrix
    find = _gram_vectors if smaller <= SHORT or rank * 3 > smaller else _krylov_vectors
    u = find(wide, rank, seed)
    scaled = wide.T @ u
    s = torch.linalg.vector_norm(scaled, dim=0)
    v = scaled / s.clamp(min=torch.finfo(s.dtype).tiny)
    return Truncated(v, s, u, energy) if turned else Truncated(u, s, v, energy)


def _gram_vectors(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """Returns the leading left singular vectors, from the eigenvectors of M M^T.

    Squaring in float32 blurs directions whose singular values are below about 1e-3 of the largest. A few triples do not
    include such directions, or lose at most 1e-6 of the energy. Many triples are computed in float64, which takes twice
    the time.
    """
    wide = matrix if rank * 3 <= matrix.shape[0] else matrix.double()
    return torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)[:, :rank].float()


def _krylov_vectors(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """Returns the leading left singular vectors by block Krylov iteration; rows must not exceed columns."""
    rows, columns = matrix.shape
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(columns, rank + OVERSAMPLE, generator=generator).to(matrix.device)
    block = torch.linalg.qr(matrix @ start).Q
    basis, reach = block, matrix.T @ block
    kept = 0.0
    while True:
        values, vectors = torch.linalg.eigh(reach.T @ reach)
        now = float(values[-rank:].sum())
        if now - kept <= GAIN * now or basis.shape[1] + block.shape[1] > rows:
            return basis @ vectors.flip(1)[:, :rank]
        kept = now
        block = matrix @ reach[:, -block.shape[1] :]
        # Twice, because one projection leaves float32 rounding in the direction of the old basis.
        for _ in range(2):
            block = block - basis @ (basis.T @ block)
        block = torch.linalg.qr(block).Q
        basis = torch.cat((basis, block), dim=1)
        reach = torch.cat((reach, matrix.T @ block), dim=1)
