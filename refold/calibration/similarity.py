"""Similarity of layers: distances of their weights, and of the residual streams before them."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from refold.blueprint.schema import POOLS, part_linears
from refold.families.arch import ArchSpec
from refold.planning.build import identity_blueprint
from refold.sources.measurements import Matrix
from refold.sources.pieces import PieceReader

CHUNK_NUMBERS = 2**24
"""Number of weights, over all layers, that are in memory at a time, in float64."""
STREAM_NUMBERS = 2**26
"""Number of float32 entries of residual streams that are kept."""


def linears_of(arch: ArchSpec) -> dict[str, str]:
    """Returns the linears of a source's layers: canonical tensor by name."""
    identity = identity_blueprint(arch)
    return {name: f"{pool}.{name}.weight" for pool in POOLS for name in part_linears(identity, pool, 0)}


def weight_distances(
    pieces: PieceReader, arch: ArchSpec, dtype: torch.dtype, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Matrix]:
    """Returns |W_i - W_j| / sqrt(|W_i|^2 + |W_j|^2) of every linear for each pair of layers, in Frobenius norms.

    The distance is 0 for equal weights and 1 for unrelated weights. Equal neurons in another order count as unrelated.

    Args:
        pieces: Reader of the source.
        arch: The source's architecture.
        dtype: Dtype of its file; a tensor read in this dtype is mapped, not copied into memory.
        progress: Called with the number of linears that are done.
    """
    found = {}
    for done, (name, canonical) in enumerate(linears_of(arch).items(), start=1):
        weights = [pieces.read(canonical, layer, dtype) for layer in range(arch.num_layers)]
        rows, columns = weights[0].shape
        squares = torch.zeros(len(weights), len(weights), dtype=torch.float64)
        step = max(1, CHUNK_NUMBERS // (len(weights) * columns))
        for first in range(0, rows, step):
            chunk = torch.stack([each[first : first + step].double().flatten() for each in weights])
            squares += chunk @ chunk.T
        own = squares.diagonal()
        both = own[:, None] + own[None, :]
        apart = ((both - 2 * squares) / both.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0).sqrt()
        found[name] = as_rows(apart.fill_diagonal_(0.0))
        progress(done)
    return found


class StreamDistances:
    """Angular distances arccos(cos) / pi between the residual streams before any two layers, means over tokens.

    arXiv 2403.17887 (section 3.2) defines the distance to find blocks of layers to drop; here it is the mean over all
    positions instead of the last one. A sample of tokens is kept if all streams would take too much memory.

    Args:
        arch: The source's architecture.
    """

    def __init__(self, arch: ArchSpec):
        self._streams: list[Tensor] = []
        self._num_kept = max(1, STREAM_NUMBERS // (arch.hidden_size * (arch.num_layers + 1)))

    def see(self, layer: int, stream: Float[Tensor, "B T D"]) -> None:
        """Keeps the residual stream before the next layer."""
        flat = stream.flatten(0, 1)
        kept = flat[:: math.ceil(len(flat) / self._num_kept)].float()
        self._streams.append(torch.nn.functional.normalize(kept, dim=-1))

    def found(self) -> Matrix:
        """Returns the distances: row and column `l` are the stream before layer `l`, the last the stream at the end."""
        size = len(self._streams)
        distances = torch.zeros(size, size, dtype=torch.float64)
        for one in range(size):
            for other in range(one + 1, size):
                # The angle is computed from the chord, because arccos near 1 would lose half of the digits.
                chord = (self._streams[one] - self._streams[other]).norm(dim=-1).clamp(max=2.0)
                distances[one, other] = (2 * torch.asin(chord.double() / 2)).mean() / math.pi
        return as_rows(distances + distances.T)


def as_rows(matrix: Float[Tensor, "n m"]) -> Matrix:
    """Returns a matrix as tuples of Python floats."""
    return tuple(tuple(row) for row in matrix.tolist())
