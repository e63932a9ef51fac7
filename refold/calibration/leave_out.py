"""True losses of a source without some of its parts, measured for many sets of parts in one pass over the layers."""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from refold.blueprint.schema import POOLS, Pool
from refold.calibration.layers import SourceLayers
from refold.checkpoint.tensor_file import write_tensors
from refold.data.packing import IGNORED, PackedSequence

PartSet = frozenset[tuple[int, Pool]]
"""Source layer and pool of each part that is left out."""
TOKENS_AT_ONCE = 512
"""Tokens whose logits are in memory at a time."""


class LeftOut(NamedTuple):
    """Losses in nats per token.

    Attributes:
        source: Loss of the whole source.
        increases: For each set of parts the loss without them minus the loss of the source.
        errors: Standard error of each increase, over sequences; 0 with a single sequence.
    """

    source: float
    increases: tuple[float, ...]
    errors: tuple[float, ...]


class _Streams:
    """Residual streams by the set of parts left out so far: in memory up to a number of bytes, beyond it in files."""

    def __init__(self, folder: Path, memory: int):
        self._folder, self._memory = folder, memory
        self._held: dict[PartSet, Tensor] = {}
        self._files: dict[PartSet, Path] = {}
        self._count = 0

    def __getitem__(self, key: PartSet) -> Tensor:
        if key in self._held:
            return self._held[key]
        with safe_open(self._files[key], framework="pt") as file:
            return file.get_tensor("stream")

    def put(self, key: PartSet, stream: Tensor) -> None:
        """Keeps a stream, in place of an earlier one of the same set."""
        self.remove(key)
        if sum(each.nbytes for each in self._held.values()) + stream.nbytes <= self._memory:
            self._held[key] = stream
            return
        self._count += 1
        self._files[key] = self._folder / f"without-{self._count}.safetensors"
        write_tensors(self._files[key], {"stream": stream.contiguous()}, {})

    def remove(self, key: PartSet) -> None:
        self._held.pop(key, None)
        if key in self._files:
            self._files.pop(key).unlink()


@torch.no_grad()
def measure_left_out(
    layers: SourceLayers,
    sequences: PackedSequence,
    left_out: Sequence[Collection[tuple[int, Pool]]],
    scratch: Path,
    memory: int = 2**30,
    progress: Callable[[int], None] = lambda done: None,
) -> LeftOut:
    """Measures the loss of a source without some parts, for several sets of parts.

    Sets share the forward pass up to the first layer in which they differ. One layer is in memory at a time, and the
    streams of all sets that have begun: up to `memory` bytes of them in memory, the others in files.

    Args:
        layers: Layers of the source.
        sequences: Packed held-out tokens `[B, T]` with their labels.
        left_out: Sets of source layer and pool; attention and MLP of one layer are two parts.
        scratch: An existing folder for streams, which are deleted again.
        memory: Bytes of streams that are kept in memory.
        progress: Called with the number of layers that have run.
    """
    wanted: list[PartSet] = [frozenset(each) for each in left_out]
    streams, whole = _Streams(scratch, memory), frozenset()
    streams.put(whole, layers.embed(sequences.input_ids))
    for index in range(layers.arch.num_layers):
        before, after = (
            dict.fromkeys(_begun(each, layer) for each in (whole, *wanted)) for layer in (index, index + 1)
        )
        for pools, keys in _by_kept(after, index):
            layer = layers.load(index, pools) if pools else None
            for key in keys:
                stream = streams[_begun(key, index)]
                streams.put(key, stream if layer is None else layer.run(stream, sequences.position_ids))
            del layer
        for key in before:
            if key not in after:
                streams.remove(key)
        progress(index + 1)
    losses: dict[PartSet, Tensor] = {}
    ending = layers.load_ending()
    for key in dict.fromkeys((whole, *wanted)):
        losses[key] = _losses(ending, streams[key], sequences.labels)
        streams.remove(key)
    counts = (sequences.labels != IGNORED).sum(dim=1)
    changes = [losses[each] - losses[whole] for each in wanted]
    total = int(counts.sum())
    return LeftOut(
        float(losses[whole].sum()) / total,
        tuple(float(change.sum()) / total for change in changes),
        tuple(_error(change, counts) for change in changes),
    )


def _begun(parts: PartSet, layer: int) -> PartSet:
    """Returns the parts of a set before a layer."""
    return frozenset(part for part in parts if part[0] < layer)


def _by_kept(keys: Collection[PartSet], layer: int) -> Iterator[tuple[tuple[Pool, ...], list[PartSet]]]:
    """Yields the parts of a layer that stay, with the sets that leave out the others; the whole layer comes last.

    The sets that leave nothing out of the layer overwrite the stream that all others begin with.
    """
    found: dict[tuple[Pool, ...], list[PartSet]] = {}
    for key in keys:
        found.setdefault(tuple(pool for pool in POOLS if (layer, pool) not in key), []).append(key)
    yield from sorted(found.items(), key=lambda item: len(item[0]))


def _losses(ending: Callable[[Tensor], Tensor], stream: Float[Tensor, "B T D"], labels: Tensor) -> Float[Tensor, " B"]:
    """Returns the summed cross-entropy of each sequence, float64."""
    found, flat = torch.zeros(labels.numel(), dtype=torch.float64), labels.flatten()
    for first in range(0, len(flat), TOKENS_AT_ONCE):
        rows = slice(first, first + TOKENS_AT_ONCE)
        logits = ending(stream.flatten(0, 1)[rows])
        found[rows] = torch.nn.functional.cross_entropy(logits, flat[rows], reduction="none", ignore_index=IGNORED)
    return found.view(labels.shape).sum(dim=1)


def _error(change: Float[Tensor, " B"], counts: Tensor) -> float:
    """Returns the standard error of a mean over tokens whose sums by sequence are `change` (a ratio estimate)."""
    if len(change) < 2:
        return 0.0
    total = counts.sum().double()
    residual = change - counts * (change.sum() / total)
    size = len(change)
    return float((residual.square().sum() * size / (size - 1)).sqrt() / total)
