"""How alike layers are: in their weights, and in the streams they read."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from refold.blueprint.contents import part_linears
from refold.blueprint.schema import POOLS
from refold.families.arch import ArchSpec
from refold.planning.build import identity_blueprint
from refold.sources.measurements import Matrix
from refold.sources.pieces import PieceReader

CHUNK_NUMBERS = 2**24
"""Weights of all layers together that are in memory at a time, in float64."""
STREAM_NUMBERS = 2**26
"""Numbers of streams that are kept, in float32."""


def linears_of(arch: ArchSpec) -> dict[str, str]:
    """Returns the linears of a source's layers: name to canonical tensor."""
    identity = identity_blueprint(arch)
    return {name: f"{pool}.{name}.weight" for pool in POOLS for name in part_linears(identity, pool, 0)}


def weight_distances(
    pieces: PieceReader, arch: ArchSpec, dtype: torch.dtype, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Matrix]:
    """Returns |W_i - W_j| / sqrt(|W_i|^2 + |W_j|^2) of every linear for each pair of layers, in Frobenius norms.

    It is 0 for equal weights and 1 for weights that have nothing in common. Neurons that stand in another order have
    nothing in common by it.

    Args:
        pieces: Reads the source.
        arch: The source's architecture.
        dtype: Of its file: what is read in it stays on disk until it is used.
        progress: Told how many linears are done.
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
    """Angular distances arccos(cos) / pi between the streams before any two layers, means over tokens.

    As arXiv 2403.17887 (section 3.2) defines it to find layers that can go together, but over all positions instead of
    the last. Some tokens stand for all where keeping all streams would take too much memory.

    Args:
        arch: The source's architecture.
    """

    def __init__(self, arch: ArchSpec):
        self._streams: list[Tensor] = []
        self._num_kept = max(1, STREAM_NUMBERS // (arch.hidden_size * (arch.num_layers + 1)))

    def see(self, layer: int, stream: Float[Tensor, "B T D"]) -> None:
        """Takes the stream before the next layer."""
        flat = stream.flatten(0, 1)
        kept = flat[:: math.ceil(len(flat) / self._num_kept)].float()
        self._streams.append(torch.nn.functional.normalize(kept, dim=-1))

    def found(self) -> Matrix:
        """Returns the distances: row and column `l` stand for the stream before layer `l`, the last for the end."""
        size = len(self._streams)
        distances = torch.zeros(size, size, dtype=torch.float64)
        for one in range(size):
            for other in range(one + 1, size):
                # Twice the angle whose sine is half the chord: arccos near 1 would lose half the digits.
                chord = (self._streams[one] - self._streams[other]).norm(dim=-1).clamp(max=2.0)
                distances[one, other] = (2 * torch.asin(chord.double() / 2)).mean() / math.pi
        return as_rows(distances + distances.T)


def as_rows(matrix: Float[Tensor, "n m"]) -> Matrix:
    """Returns a matrix as plain numbers."""
    return tuple(tuple(row) for row in matrix.tolist())
