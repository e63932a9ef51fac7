"""All feature maps of a plan: fitted to the source's attention and measured on it, in one walk through the layers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from refold.blueprint.tensors import target_tensors
from refold.conversion.approximation import LEARNED, Approximation, StoredMap, stored_maps
from refold.conversion.fitting import FitSettings, MapFit, Vectors
from refold.conversion.fresh import fill_of, fresh_tensor, tensor_seed
from refold.conversion.plan import Plan
from refold.data.packing import PackedSequence
from refold.data.readers import DataSource
from refold.measuring.calibration import CalibrationText, draw_streams, pack_calibration
from refold.measuring.layers import AttentionSample, SourceLayer, SourceLayers
from refold.measuring.pieces import PieceReader
from refold.measuring.source_model import SourceModel
from refold.modeling.load import load_tokenizer

DIGITS = 6

Streams = tuple[Tensor, Tensor | None] | None
"""Hidden states `[B, T, D]` before a layer and positions `[B, T]` in their documents; None: there is no text."""


@dataclass
class _Sampled:
    """A map, and what has been seen of its layers so far."""

    stored: StoredMap
    fit: list[AttentionSample] = field(default_factory=list)
    held_out: dict[int, AttentionSample] = field(default_factory=dict)


class MapFitter:
    """Fits and measures a plan's feature maps.

    Of layers that share a map the samples are kept until the last of them is read; everything else is let go layer by
    layer.

    Args:
        plan: The conversion.
        model: Its source.
        pieces: Reads the source's weights.
        device: Where layers run and maps are fitted.
        settings: How much is looked at.

    Attributes:
        tensors: After `run`, fitted maps by name in the target, in the dtype of the target.
        approximation: After `run`, by `depths.<d>`.

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
        self._dtype = getattr(torch, plan.source.dtype)
        self._length = min(self._settings.sequence_length, model.arch.max_position_embeddings)
        self._maps = stored_maps(plan.blueprint, plan.starts)
        self._wanted = sorted({layer for stored in self._maps for layer in stored.layers})
        self.tensors: dict[str, Tensor] = {}
        self.approximation: dict[str, Approximation] = {}

    @property
    def num_layers(self) -> int:
        """How many layers are read for it."""
        return len(self._wanted)

    def run(self, text: DataSource | None = None, progress: Callable[[int], None] = lambda done: None) -> None:
        """Fits what is to be fitted and measures all maps: on text where there is some, else on random inputs.

        Args:
            text: Calibration text.
            progress: Told how many layers are done.

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
        )

    def _walk(self, packed: CalibrationText | None) -> Iterator[tuple[SourceLayer, Streams, Streams]]:
        """Yields the layers that are wanted with the text to fit to and the text to measure on before them."""
        if packed is None:
            for index in self._wanted:
                yield self._layers.load(index, ("mixer",)), None, None
            return
        parts = [part for part in packed if part is not None]
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
            # Each layer shows other sequences.
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
        """Fits and measures a map all of whose layers have been seen."""
        stored = sampled.stored
        mapping = MapFit(self._layers.arch, stored.options, self._device)
        start = self._start(stored)
        fitted: Vectors | None = None
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

    def _start(self, stored: StoredMap) -> Vectors:
        """What is stored where nothing is fitted, in the dtype of the target."""
        blueprint, seed = self._plan.blueprint, self._plan.starts.seed
        wanted = {f"{stored.prefix}{name}" for name in stored.names}
        return {
            tensor.local: fresh_tensor(tensor, blueprint.arch, seed, fill_of(blueprint, tensor)).to(self._dtype)
            for tensor in target_tensors(blueprint)
            if tensor.name in wanted
        }
