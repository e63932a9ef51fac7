"""Linear maps in place of dropped parts: measured layer by layer on text, and folded into the source's weights."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from refold.blueprint.origins import OUTPUT_PROJECTIONS, Replacement
from refold.blueprint.schema import POOLS, Pool
from refold.calibration.layers import SourceLayers, WatchPart
from refold.calibration.moments import MomentStore
from refold.calibration.replacement import LinearMap, MapSums, halve, token_weights
from refold.calibration.weighting import Moments
from refold.checkpoint.tensor_file import write_tensors
from refold.data.packing import PackedSequence
from refold.sources.pieces import PieceReader


@dataclass(frozen=True)
class MeasuredMap:
    """A linear map in place of dropped parts, kept in a file.

    Attributes:
        replacement: The dropped parts, and the part before them.
        kept: Share of the energy lost from the stream that the map restores on text that it was not fitted to.
        path: File of the map.
    """

    replacement: Replacement
    kept: float
    path: Path

    def read(self) -> Float[Tensor, "*rows D"]:
        """Returns the map T `[D, D]`, or its diagonal `[D]`; float32."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor("map")

    def describe(self) -> str:
        """Returns the map and the energy that it restores in words."""
        return f"drop: a linear map restores {self.kept:.1%} of the energy lost with {self.replacement.describe()}"


@dataclass
class _OpenRun:
    """A run of dropped parts that has begun, in the folded model.

    Attributes:
        replacement: The run.
        before: Update of the part before the run.
    """

    replacement: Replacement
    before: Float[Tensor, "B T D"]

    def fit(self, folded: Float[Tensor, "B T D"], wanted: Float[Tensor, "B T D"]) -> LinearMap:
        """Returns the map that brings the folded model's stream after the run close to the source's."""
        weights, lost = token_weights(wanted), wanted - folded
        sequences, tokens = weights.shape
        halves = halve(torch.arange(sequences).repeat_interleave(tokens)).view(sequences, tokens)
        sums = MapSums(folded.shape[-1], self.replacement.is_diagonal)
        for half in range(2):
            chosen = halves == half
            sums.add(half, self.before[chosen], lost[chosen], weights[chosen])
        return sums.fit()

    def apply(self, fitted: LinearMap, folded: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Returns the folded model's stream after the run with the map in the part before it."""
        mapped = self.before * fitted.matrix if self.replacement.is_diagonal else self.before @ fitted.matrix.T
        return folded - self.before + mapped


@dataclass(frozen=True)
class MapPlan:
    """The maps to solve.

    Attributes:
        replacements: The runs of dropped parts that maps replace.
        dropped: Source layer and pool of all dropped parts.
        is_alone: Whether each map is solved as if the other runs were whole, for fits in sequence, which correct the
            errors of earlier runs themselves.
    """

    replacements: Sequence[Replacement]
    dropped: Collection[tuple[int, Pool]]
    is_alone: bool = False

    def concerns(self, layer: int) -> bool:
        """Says whether a part of a layer is dropped or takes a map."""
        return any((layer, pool) in self.dropped for pool in POOLS) or any(
            each.layer == layer for each in self.replacements
        )


class _MapPass:
    """Source and folded model side by side: dropped parts are absent in the folded model, and solved maps are in it."""

    def __init__(self, layers: SourceLayers, plan: MapPlan, positions: Tensor, folder: Path):
        self._layers, self._plan, self._positions, self._folder = layers, plan, positions, folder
        self._running: _OpenRun | None = None
        self.found: list[MeasuredMap] = []

    def run_layer(self, index: int, source: Tensor, folded: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the streams of source and folded model after a layer."""
        between: list[Tensor] = []
        layer = self._layers.load(index)
        after = layer.run(source, self._positions, watch_part=_keep_stream(between, "mlp"))
        del layer
        if folded is source and not self._plan.concerns(index):
            return after, after
        kept: tuple[Pool, ...] = tuple(pool for pool in POOLS if (index, pool) not in self._plan.dropped)
        if self._layers.arch.residual == "parallel":
            return after, self._run_parts(index, kept, source, folded) if kept else folded
        for pool, wanted in (("mixer", source), ("mlp", torch.cat(between))):
            if pool in kept:
                folded = self._run_parts(index, (pool,), wanted, folded)
        return after, folded

    def end_run(self, folded: Tensor, wanted: Tensor) -> Tensor:
        """Solves the map of the run that is under way, if there is one; returns the folded model's stream with it."""
        if self._running is None:
            return folded
        fitted, replacement = self._running.fit(folded, wanted), self._running.replacement
        path = self._folder / f"map-{replacement.pool}-{replacement.layer:04d}.safetensors"
        write_tensors(path, {"map": fitted.matrix.contiguous()}, {})
        self.found.append(MeasuredMap(replacement, fitted.kept, path))
        folded = self._running.apply(fitted, folded)
        self._running = None
        return folded

    def _run_parts(self, index: int, pools: tuple[Pool, ...], wanted: Tensor, folded: Tensor) -> Tensor:
        """Returns the folded model's stream after kept parts that read one input, which is `wanted` in the source."""
        folded = self.end_run(folded, wanted)
        if self._plan.is_alone:
            folded = wanted
        replacement = next((each for each in self._plan.replacements if self._begins(each, index, pools)), None)
        updates: list[Tensor] = []
        watch = None if replacement is None else _keep_update(updates, replacement.pool)
        folded = self._layers.load(index, pools).run(folded, self._positions, watch_part=watch)
        if replacement is not None:
            self._running = _OpenRun(replacement, torch.cat(updates))
        return folded

    @staticmethod
    def _begins(replacement: Replacement, index: int, pools: tuple[Pool, ...]) -> bool:
        return replacement.layer == index and replacement.pool in pools


@torch.no_grad()
def measure_replacements(
    layers: SourceLayers,
    sequences: PackedSequence,
    plan: MapPlan,
    folder: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[MeasuredMap, ...]:
    """Solves the map of each replacement, first to last; one layer is in memory at a time.

    Source and folded model run side by side, the folded model without the dropped parts and with the maps that are
    solved already. Each map brings the stream after its run close to the source's, so that it also corrects the errors
    that earlier runs have left. Four residual streams are in memory.

    Args:
        layers: Layers of the source.
        sequences: Packed calibration tokens.
        plan: The runs of dropped parts.
        folder: An existing folder for the maps.
        progress: Called with the number of layers that have run.
    """
    source = folded = layers.embed(sequences.input_ids)
    running = _MapPass(layers, plan, sequences.position_ids, folder)
    for index in range(layers.arch.num_layers):
        source, folded = running.run_layer(index, source, folded)
        progress(index + 1)
    running.end_run(folded, source)
    return tuple(running.found)


def _keep_stream(found: list[Tensor], wanted: Pool) -> WatchPart:
    """Returns a watch that keeps the stream before the parts of a pool."""

    def keep(layer: int, pool: Pool, stream: Tensor, update: Tensor) -> None:
        if pool == wanted:
            found.append(stream.cpu())

    return keep


def _keep_update(found: list[Tensor], wanted: Pool) -> WatchPart:
    """Returns a watch that keeps the updates of the parts of a pool."""

    def keep(layer: int, pool: Pool, stream: Tensor, update: Tensor) -> None:
        if pool == wanted:
            found.append(update.cpu())

    return keep


class ReplacedPieces(PieceReader):
    """Reader of a source whose output projections, or the norms behind them, hold the maps of dropped parts.

    Args:
        pieces: Reader of the source.
        maps: The measured maps.
    """

    def __init__(self, pieces: PieceReader, maps: Sequence[MeasuredMap]):
        super().__init__(pieces.model, pieces.reader)
        self._pieces = pieces
        self._maps = {(each.replacement.layer, each.replacement.pool, each.replacement.into): each for each in maps}

    def read(self, canonical: str, layer: int | None, dtype: torch.dtype, repeat: int = 1) -> Tensor:
        pool, _, local = canonical.partition(".")
        owner, _, kind = local.rpartition(".")
        found = self._maps.get((layer, pool, owner))  # pyright: ignore[reportArgumentType, reportCallIssue]
        if found is None:
            return self._pieces.read(canonical, layer, dtype, repeat)
        value, matrix = self._pieces.read(canonical, layer, torch.float32, repeat), found.read()
        if not found.replacement.is_diagonal:
            return (matrix @ value).to(dtype)
        offset = self.model.arch.norm.offset if kind == "weight" else 0.0
        return (matrix * (value + offset) - offset).to(dtype)


class ReplacedMoments(MomentStore):
    """Moments of a source with maps in its output projections.

    The output of such a projection takes the place of the dropped parts' outputs, so that its gradients are those
    behind the last dropped part. Its inputs are those of the source.

    Args:
        store: Moments of the source.
        maps: The measured maps.
    """

    def __init__(self, store: MomentStore, maps: Sequence[MeasuredMap]):
        super().__init__(store.folder, store.shrinkage)
        self._store = store
        self._last = {
            (each.replacement.layer, each.replacement.into): each.replacement.gone[-1]
            for each in maps
            if not each.replacement.is_diagonal
        }

    def read(self, layer: int, linear: str) -> Moments:
        found = self._store.read(layer, linear)
        if (layer, linear) not in self._last or found.outputs is None:
            return found
        last, pool = self._last[layer, linear]
        return Moments(found.inputs, self._store.read(last, OUTPUT_PROJECTIONS[pool]).outputs)
