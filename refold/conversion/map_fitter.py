"""Fits feature maps of linear attention to the softmax attention of the source."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from refold.blueprint.tensors import float_tensors
from refold.calibration.calibration import CalibrationText, draw_streams, pack_calibration
from refold.calibration.layers import AttentionSample, SourceLayer, SourceLayers
from refold.conversion.target_tensors import fresh_tensor, tensor_seed
from refold.data.packing import PackedSequence
from refold.data.readers import DataSource
from refold.families.arch import ArchSpec
from refold.mixers.spec import MixerSpec
from refold.modeling.load import load_tokenizer
from refold.nn.mixers.linear_attention import LinearAttentionMixer
from refold.planning.approximation import LEARNED, Approximation, StoredMap, stored_maps
from refold.planning.plan import Plan
from refold.sources.pieces import PieceReader
from refold.sources.source_model import SourceModel

SMALLEST_WEIGHT = 1e-6
"""Added to an approximated weight before its logarithm: maps with a relu can give a weight of zero."""

FitVectors = Mapping[str, Tensor]
"""Name in the mixer, such as `q_map.weight`, to value."""


@dataclass(frozen=True)
class FitSettings:
    """Settings of the fit of feature maps: amount of text and length of training.

    Attributes:
        sequence_length: Tokens of a sequence, at most the source's context.
        fit_sequences: Sequences that a map is fitted to; layers that share a map divide them.
        held_out_sequences: Sequences of each layer that errors are measured on.
        steps: Steps of Adam (arXiv 1412.6980).
        rows_per_step: Sequences in a step.
        learning_rate: Learning rate of the first step; it falls linearly to zero.
    """

    sequence_length: int = 256
    fit_sequences: int = 16
    held_out_sequences: int = 4
    steps: int = 300
    rows_per_step: int = 1
    learning_rate: float = 0.05


class Error(NamedTuple):
    """Error of a map, means over heads and tokens; `Approximation` defines both numbers."""

    distance: float
    gap: float


class MapFit:
    """Feature maps of one mixer, fitted and measured through the mixer's own computation.

    Args:
        arch: The source's architecture.
        mixer: The mixer that owns the maps.
        device: Device that computes.
    """

    def __init__(self, arch: ArchSpec, mixer: MixerSpec, device: str = "cpu"):
        # The mixer's linears are not used; its vectors are arguments of each call.
        with torch.device("meta"):
            self._mixer = LinearAttentionMixer(arch, mixer, stores_vectors=False)
        self._device = device

    @torch.enable_grad()
    def fit(
        self, start: FitVectors, samples: Sequence[AttentionSample], settings: FitSettings, seed: int
    ) -> FitVectors:
        """Fits maps of queries and keys to the source's attention (Hedgehog, arXiv 2402.04347, equation 4).

        Minimises the cross-entropy between the softmax and the mixer's own weights, in float32. Each head is fitted
        independently. The same arguments give the same bits on the same machine.

        Args:
            start: Initial vectors of the mixer; only the maps change.
            samples: Attention of the layers that share the maps.
            settings: Number of steps, their size and learning rate.
            seed: Seed of the order of sequences.
        """
        # Copies: Adam changes them in place.
        vectors = {name: value.detach().to(self._device, torch.float32, copy=True) for name, value in start.items()}
        learned = [vectors[name].requires_grad_() for name in LEARNED]
        optimizer = torch.optim.Adam(learned, lr=settings.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
        batches = _batches(samples, settings.rows_per_step, seed)
        for _ in range(settings.steps):
            optimizer.zero_grad()
            # A sum over heads, so that the step of one head does not depend on the number of heads.
            self._cross_entropy(_to(next(batches), self._device), vectors).sum().backward()
            optimizer.step()
            schedule.step()
        return {name: value.detach().cpu() for name, value in vectors.items()}

    @torch.no_grad()
    def measure(self, vectors: FitVectors, sample: AttentionSample) -> Error:
        """Returns the error of the mixer's weights against the softmax."""
        vectors = {name: value.float().to(self._device) for name, value in vectors.items()}
        distances, gaps = [], []
        for row in range(len(sample.query)):
            one = _to(sample.rows([row]), self._device)
            # Equals half the sum of |p - q| for rows that sum to one; missing weight counts whole where rows vanish.
            distances.append((one.weights - self._weights(one, vectors)).clamp(min=0).sum(-1).mean())
            entropy = -torch.special.xlogy(one.weights, one.weights).sum(-1).mean()
            gaps.append(self._cross_entropy(one, vectors).mean() - entropy)
        return Error(float(torch.stack(distances).mean()), float(torch.stack(gaps).mean()))

    def _weights(self, sample: AttentionSample, vectors: FitVectors) -> Float[Tensor, "B H T T"]:
        weights = self._mixer.mixing_matrix(sample.query, sample.key, sample.resets, vectors)
        if self._mixer.normalise_weights:
            return weights
        return weights / weights.sum(dim=-1, keepdim=True).clamp(min=SMALLEST_WEIGHT)

    def _cross_entropy(self, sample: AttentionSample, vectors: FitVectors) -> Float[Tensor, " H"]:
        logarithms = (self._weights(sample, vectors) + SMALLEST_WEIGHT).log()
        return -(sample.weights * logarithms).sum(dim=-1).mean(dim=(0, 2))


def _batches(samples: Sequence[AttentionSample], size: int, seed: int) -> Iterator[AttentionSample]:
    """Yields sequences of all samples endlessly, in a new order for each pass."""
    places = [(sample, row) for sample in samples for row in range(len(sample.query))]
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(places), generator=generator).tolist()
        for first in range(0, len(order) - len(order) % size or len(order), size):
            chosen = [places[place][0].rows([places[place][1]]) for place in order[first : first + size]]
            yield AttentionSample(*(torch.cat(parts) for parts in zip(*chosen, strict=True)))


def _to(sample: AttentionSample, device: str) -> AttentionSample:
    return AttentionSample(*(part.to(device) for part in sample))


DIGITS = 6

Streams = tuple[Tensor, Tensor | None] | None
"""Hidden states `[B, T, D]` before a layer, and positions `[B, T]` within documents; None: there is no text."""


@dataclass
class _Sampled:
    """A map, and the attention sampled from its layers so far."""

    stored: StoredMap
    fit: list[AttentionSample] = field(default_factory=list)
    held_out: dict[int, AttentionSample] = field(default_factory=dict)


def mapped_layers(maps: Sequence[StoredMap]) -> list[int]:
    """Returns the source layers whose attention is approximated by feature maps, in ascending order."""
    return sorted({layer for stored in maps for layer in stored.layers})


class MapFitter:
    """Fits and measures a plan's feature maps.

    Samples of layers that share a map are kept until the last of these layers is read. All other memory is freed layer
    by layer.

    Args:
        plan: The conversion.
        model: Its source.
        pieces: Reader of the source's weights.
        device: Device that runs layers and fits maps.
        settings: Amount of text and length of training.

    Attributes:
        tensors: After `run`, fitted maps by tensor name, in the dtype of the folded model.
        approximation: After `run`, the error of each map by `depths.<d>`.

    Raises:
        RecipeError: A map is to be fitted where queries or keys start fresh.
    """

    def __init__(
        self,
        plan: Plan,
        model: SourceModel,
        pieces: PieceReader,
        device: str = "cpu",
        settings: FitSettings | None = None,
    ):
        self._plan, self._source, self._device = plan, model, device
        self._layers = SourceLayers(model, pieces, device)
        self._settings = settings or FitSettings()
        self._dtype = getattr(torch, plan.dtype)
        self._length = min(self._settings.sequence_length, model.arch.max_position_embeddings)
        self._maps = stored_maps(plan.blueprint, plan.starts)
        self._wanted = mapped_layers(self._maps)
        self.tensors: dict[str, Tensor] = {}
        self.approximation: dict[str, Approximation] = {}

    def run(self, text: DataSource | None = None, progress: Callable[[int], None] = lambda done: None) -> None:
        """Fits the maps that have a fit and measures all maps, on text if there is some, else on random inputs.

        Args:
            text: Calibration text.
            progress: Called with the number of layers that are done.

        Raises:
            DataError: The text is too short, or cannot be read.
            SourceError: There is text, and the source has no tokenizer.
        """
        assert text is not None or all(stored.fit != "calibration" for stored in self._maps)
        if not self._maps:
            return
        packed = None if text is None else self._pack(text)
        waiting = [_Sampled(stored) for stored in self._maps]
        found: dict[int, Approximation] = {}
        for done, (layer, fit, held_out) in enumerate(self._walk(packed), start=1):
            sampled = next(each for each in waiting if layer.index in each.stored.layers)
            self._sample(sampled, layer, fit, held_out)
            if len(sampled.held_out) == len(sampled.stored.layers):
                waiting.remove(sampled)
                found |= self._settle(sampled, is_text=text is not None)
            progress(done)
        self.approximation = {f"depths.{depth}": found[depth] for depth in sorted(found)}

    def _pack(self, text: DataSource) -> CalibrationText:
        is_fitted = any(stored.fit == "calibration" for stored in self._maps)
        return pack_calibration(
            text,
            load_tokenizer(self._source.source),
            sequence_length=self._length,
            num_fit=self._settings.fit_sequences if is_fitted else 0,
            num_held_out=self._settings.held_out_sequences,
            seed=self._plan.starts.seed,
            vocab_size=self._source.arch.vocab_size,
        )

    def _walk(self, packed: CalibrationText | None) -> Iterator[tuple[SourceLayer, Streams, Streams]]:
        """Yields each layer that has a map, with its input streams for the fit and for the measurement."""
        if packed is None:
            for index in self._wanted:
                yield self._layers.load(index, ("mixer",)), None, None
            return
        parts = [part for part in (packed.fit, packed.held_out) if part is not None]
        joined = PackedSequence(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        num_fit = 0 if packed.fit is None else len(packed.fit.input_ids)
        for layer, streams in self._layers.walk(joined, self._wanted[-1] + 1):
            if layer.index in self._wanted:
                positions = joined.position_ids
                yield layer, (streams[:num_fit], positions[:num_fit]), (streams[num_fit:], positions[num_fit:])

    def _sample(self, sampled: _Sampled, layer: SourceLayer, fit: Streams, held_out: Streams) -> None:
        stored, settings = sampled.stored, self._settings
        count = -(-settings.fit_sequences // len(stored.layers))
        if stored.fit == "calibration":
            assert fit is not None
            # Layers that share a map take different sequences.
            place = stored.layers.index(layer.index)
            rows = slice(place, None, len(stored.layers))
            streams, positions = fit
            sampled.fit.append(layer.attention(streams[rows], None if positions is None else positions[rows]))
        elif stored.fit == "data_free":
            sampled.fit.append(layer.attention(self._draw(count, layer.index, "fit"), None))
        if held_out is None:
            held_out = self._draw(settings.held_out_sequences, layer.index, "held out"), None
        sampled.held_out[layer.index] = layer.attention(*held_out)

    def _draw(self, rows: int, layer: int, purpose: str) -> Tensor:
        seed = tensor_seed(self._plan.starts.seed, f"layers.{layer}: {purpose}")
        return draw_streams(self._layers.arch, rows, self._length, seed)

    def _settle(self, sampled: _Sampled, is_text: bool) -> dict[int, Approximation]:
        """Fits and measures a map once all of its layers are sampled."""
        stored = sampled.stored
        mapping = MapFit(self._layers.arch, stored.mixer, self._device)
        start = self._start(stored)
        fitted: FitVectors | None = None
        if stored.fit != "none":
            found = mapping.fit(start, sampled.fit, self._settings, tensor_seed(self._plan.starts.seed, stored.prefix))
            fitted = {name: value.to(self._dtype) for name, value in found.items()}
            self.tensors |= {f"{stored.prefix}{name}": fitted[name] for name in LEARNED}
        approximations = {}
        for depth in stored.depths:
            sample = sampled.held_out[self._plan.blueprint.depths[depth].source]
            before = mapping.measure(start, sample)
            after = None if fitted is None else mapping.measure(fitted, sample)
            approximations[depth] = Approximation(
                start=round(before.distance, DIGITS),
                start_gap=round(before.gap, DIGITS),
                fitted=None if after is None else round(after.distance, DIGITS),
                fitted_gap=None if after is None else round(after.gap, DIGITS),
                inputs="text" if is_text else "random",
                tokens=sample.resets.numel(),
            )
        return approximations

    def _start(self, stored: StoredMap) -> FitVectors:
        """Returns the initial map, in the dtype of the folded model."""
        blueprint, seed = self._plan.blueprint, self._plan.starts.seed
        wanted = {f"{stored.prefix}{name}" for name in stored.names}
        return {
            tensor.local: fresh_tensor(tensor, tensor.fill(blueprint), seed).to(self._dtype)
            for tensor in float_tensors(blueprint)
            if tensor.name in wanted
        }
