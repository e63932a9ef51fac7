"""One feature map fitted to a softmax, and its distance from it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from refold.conversion.approximation import LEARNED
from refold.families.arch import ArchSpec
from refold.measuring.layers import AttentionSample
from refold.nn.mixers.linear_attention import LinearAttention

SMALLEST_WEIGHT = 1e-6
"""Added to an approximated weight before its logarithm is taken: maps with a relu can give none at all."""

Vectors = Mapping[str, Tensor]
"""Name in the mixer, such as `q_map.weight`, to value."""


@dataclass(frozen=True)
class FitSettings:
    """How much is looked at, and how long maps are fitted.

    Attributes:
        sequence_length: Tokens of a sequence, where the source's context is as long.
        fit_sequences: Sequences a map is fitted to; layers that share a map divide them.
        held_out_sequences: Sequences of each layer measured on.
        steps: Of Adam (arXiv 1412.6980).
        rows_per_step: Sequences in a step.
        learning_rate: At first; it falls to zero in a line.
    """

    sequence_length: int = 256
    fit_sequences: int = 16
    held_out_sequences: int = 4
    steps: int = 300
    rows_per_step: int = 1
    learning_rate: float = 0.05


class Error(NamedTuple):
    """Means over heads and tokens; see `Approximation`."""

    distance: float
    gap: float


class MapFit:
    """Feature maps of one mixer, computed by the mixer itself.

    Args:
        arch: The source's architecture.
        options: Of the mixer.
        device: Where to compute.
    """

    def __init__(self, arch: ArchSpec, options: Mapping[str, Any], device: str = "cpu"):
        # Its linears are never asked, its vectors are given with each call.
        with torch.device("meta"):
            self._mixer = LinearAttention(arch, dict(options), stores_vectors=False)
        self._device = device

    @torch.enable_grad()
    def fit(self, start: Vectors, samples: Sequence[AttentionSample], settings: FitSettings, seed: int) -> Vectors:
        """Fits maps of queries and keys to the source's attention (Hedgehog, arXiv 2402.04347, equation 4).

        Minimises the cross-entropy between the softmax and the mixer's own weights, in float32; heads do not touch each
        other. The same arguments give the same bits on the same machine.

        Args:
            start: Where maps begin; what is not learned stays as it is.
            samples: Attention of the layers that share the maps.
            settings: Steps, their size and their rate.
            seed: Order of sequences.
        """
        # Copies: Adam changes them in place.
        vectors = {name: value.detach().to(self._device, torch.float32, copy=True) for name, value in start.items()}
        learned = [vectors[name].requires_grad_() for name in LEARNED]
        optimizer = torch.optim.Adam(learned, lr=settings.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
        batches = _batches(samples, settings.rows_per_step, seed)
        for _ in range(settings.steps):
            optimizer.zero_grad()
            # A sum over heads: each learns at its own pace, however many there are.
            self._cross_entropy(_to(next(batches), self._device), vectors).sum().backward()
            optimizer.step()
            schedule.step()
        return {name: value.detach().cpu() for name, value in vectors.items()}

    @torch.no_grad()
    def measure(self, vectors: Vectors, sample: AttentionSample) -> Error:
        """Returns how far the mixer's weights are off the softmax."""
        vectors = {name: value.float().to(self._device) for name, value in vectors.items()}
        distances, gaps = [], []
        for row in range(len(sample.query)):
            one = _to(sample.rows([row]), self._device)
            # Of rows that sum to one half the sum of |p - q|; where weights vanish, all of what is missing counts.
            distances.append((one.weights - self._weights(one, vectors)).clamp(min=0).sum(-1).mean())
            entropy = -torch.special.xlogy(one.weights, one.weights).sum(-1).mean()
            gaps.append(self._cross_entropy(one, vectors).mean() - entropy)
        return Error(float(torch.stack(distances).mean()), float(torch.stack(gaps).mean()))

    def _weights(self, sample: AttentionSample, vectors: Vectors) -> Float[Tensor, "B H T T"]:
        weights = self._mixer.mixing_matrix(sample.query, sample.key, sample.resets, vectors)
        if self._mixer.normalise_weights:
            return weights
        return weights / weights.sum(dim=-1, keepdim=True).clamp(min=SMALLEST_WEIGHT)

    def _cross_entropy(self, sample: AttentionSample, vectors: Vectors) -> Float[Tensor, " H"]:
        logarithms = (self._weights(sample, vectors) + SMALLEST_WEIGHT).log()
        return -(sample.weights * logarithms).sum(dim=-1).mean(dim=(0, 2))


def _batches(samples: Sequence[AttentionSample], size: int, seed: int) -> Iterator[AttentionSample]:
    """Yields sequences of all samples in ever new orders, without end."""
    places = [(sample, row) for sample in samples for row in range(len(sample.query))]
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(places), generator=generator).tolist()
        for first in range(0, len(order) - len(order) % size or len(order), size):
            chosen = [places[place][0].rows([places[place][1]]) for place in order[first : first + size]]
            yield AttentionSample(*(torch.cat(parts) for parts in zip(*chosen, strict=True)))


def _to(sample: AttentionSample, device: str) -> AttentionSample:
    return AttentionSample(*(part.to(device) for part in sample))
