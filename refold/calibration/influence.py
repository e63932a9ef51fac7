"""Influence of each layer, attention and MLP of a source on the residual stream of a text."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from refold.calibration.layers import SourceLayers, Watch
from refold.data.packing import PackedSequence
from refold.sources.measurements import Influence

WatchStream = Callable[[int, Tensor], None]
"""Called with a layer's index and the residual stream before the layer; at the end with the number of layers."""


class _Means:
    """Sums of one minus the cosine similarity, by layer and part, in float64."""

    def __init__(self, num_layers: int):
        self._sums = {name: [0.0] * num_layers for name in ("block", "attention", "mlp")}

    def see_part(self, layer: int, pool: str, stream: Tensor, update: Tensor) -> None:
        name = "attention" if pool == "mixer" else "mlp"
        self._sums[name][layer] += total_change(stream, stream + update)

    def see_block(self, layer: int, before: Tensor, after: Tensor) -> None:
        self._sums["block"][layer] += sum(total_change(*rows) for rows in zip(before, after, strict=True))

    def over(self, tokens: int) -> Influence:
        return Influence(**{name: tuple(value / tokens for value in sums) for name, sums in self._sums.items()})


def total_change(before: Float[Tensor, "*tokens D"], after: Float[Tensor, "*tokens D"]) -> float:
    """Returns one minus the cosine similarity, summed over tokens.

    It is computed as |u - v|^2 / 2 of the two directions, because a difference to 1 would lose digits.
    """
    first, second = (torch.nn.functional.normalize(each.double(), dim=-1) for each in (before, after))
    return float((first - second).square().sum()) / 2


def measure_influence(
    layers: SourceLayers,
    sequences: PackedSequence,
    *,
    watch: Watch | None = None,
    watch_stream: WatchStream = lambda layer, stream: None,
    progress: Callable[[int], None] = lambda done: None,
) -> Influence:
    """Runs sequences through a source and measures the influence of each layer; one layer is in memory at a time.

    Args:
        layers: Layers of the source.
        sequences: Packed tokens, a batch.
        watch: Called with the inputs of every linear.
        watch_stream: Called with every residual stream.
        progress: Called with the number of layers that have run.
    """
    num_layers = layers.arch.num_layers
    means = _Means(num_layers)
    hidden = layers.embed(sequences.input_ids)
    for index in range(num_layers):
        watch_stream(index, hidden)
        after = layers.load(index).run(hidden, sequences.position_ids, watch, means.see_part)
        means.see_block(index, hidden, after)
        hidden = after
        progress(index + 1)
    watch_stream(num_layers, hidden)
    return means.over(sequences.input_ids.numel())
