"""Analysis of a source, in one streamed pass over its layers and two over its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from refold.analysis.page import write_page
from refold.calibration.calibration import pack_calibration
from refold.calibration.influence import measure_influence
from refold.calibration.layers import SourceLayers
from refold.calibration.moments import MomentStore, MomentSums
from refold.calibration.similarity import StreamDistances, linears_of, weight_distances
from refold.calibration.spectra import tie_spectra, tyings
from refold.checkpoint.folder import AtomicFolder
from refold.checkpoint.locate import Source, locate
from refold.checkpoint.reader import CheckpointReader
from refold.data.corpus import Data, open_text
from refold.data.mixture import describe_one_kind
from refold.data.packing import IGNORED, PackedSequence
from refold.data.readers import DataSource
from refold.errors import DataError, SourceError, given_or_default
from refold.modeling.load import choose_device, load_tokenizer
from refold.nn.processor import fast_float32
from refold.sources.measurements import MOMENTS_NAME, MeasuredText, Measurements, MomentSummary, Similarity
from refold.sources.pieces import PieceReader
from refold.sources.source_model import SourceModel, read_source_model, record_source

TEXT_BYTES = 2**26
"""Bytes of a generator or stream that are read at most."""
RANDOM_NOTE = (
    "measured on random tokens, because no text was given: influence on real text differs; give text with --data for "
    "reliable figures"
)


@dataclass(frozen=True)
class AnalysisSettings:
    """Settings of an analysis: its measurements and the amount of text.

    Attributes:
        tokens: Tokens of text, drawn from all over it.
        context: Tokens of each sequence, at most the source's context.
        seed: Seed of the choice of sequences, or of random tokens.
        moments: Whether the second moments of every linear's inputs are stored, beside their summaries.
        spectra: Whether residual spectra are measured; for large models they take longer than all other measurements.
        device: Device that runs layers and decomposes matrices.

    Raises:
        DataError: Fewer than two tokens.
    """

    tokens: int = 16_384
    context: int = 512
    seed: int = 0
    moments: bool = False
    spectra: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        if min(self.tokens, self.context) < 2:
            raise DataError(
                f"analyse: at least 2 tokens and a context of 2 are required (got {self.tokens} and {self.context})"
            )


def analyse(
    source: str | Path | Source,
    out: str | Path | None = None,
    data: Data | None = None,
    *,
    settings: AnalysisSettings | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measurements:
    """Measures the influence and similarity of a source's layers, and the loss by tying them.

    One layer is in memory at a time, so a source may be larger than memory.

    Args:
        source: Folder or hub id.
        out: The folder to write, with `measurements.json`, figures and `index.html`; None: nothing is written.
        data: Text (see `refold.data.corpus`), best of several kinds with weights; None: random tokens.
        settings: Measurements to make and amount of text.
        overwrite: Replace a folder that refold wrote.
        progress: Called with the steps done and the steps in all.

    Raises:
        DataError: The text is missing, broken or too short; or moments are asked for without a folder.
        FolderError: The destination exists, is locked or cannot be written.
        SourceError: The source is missing, broken or unknown, or has no weights.
    """
    settings = given_or_default(settings, AnalysisSettings, "settings")
    settings = replace(settings, device=str(choose_device(settings.device)))
    if settings.moments and out is None:
        raise DataError("analyse: a folder is required where moments are stored (got none); give --out DIR")
    located = source if isinstance(source, Source) else locate(source)
    model = read_source_model(located)
    if located.headers(config_only=True) is None:
        raise SourceError(f"{located.where}: safetensors weights are required (only config.json is there)")
    model.check_tensors()
    text = None if data is None else open_text(data, limit=TEXT_BYTES)
    if out is None:
        return _measure(model, text, settings, None, progress)
    with AtomicFolder(out, overwrite) as folder:
        found = _measure(model, text, settings, folder.path, progress)
        found.write(folder.path)
        write_page(found, folder.path)
    return found


def _measure(
    model: SourceModel,
    text: DataSource | None,
    settings: AnalysisSettings,
    folder: Path | None,
    progress: Callable[[int, int], None],
) -> Measurements:
    record, files, fingerprint = record_source(model), model.source.fetch(), model.source.fingerprint()
    model = read_source_model(locate(files))
    arch = model.arch
    ways = tyings(arch.num_layers) if settings.spectra else []
    steps = arch.num_layers + len(linears_of(arch)) * (1 + len(ways))
    sequences, described = _draw(model, text, settings)
    done = 0

    def step(_: int) -> None:
        nonlocal done
        done += 1
        progress(done, steps)

    with CheckpointReader(files) as reader, torch.inference_mode(), fast_float32(settings.device):
        pieces = PieceReader(model, reader)
        layers = SourceLayers(model, pieces, settings.device)
        store = None
        if settings.moments and folder is not None:
            (folder / MOMENTS_NAME).mkdir()
            store = MomentStore(folder / MOMENTS_NAME)
        distances = StreamDistances(arch)
        seen = _SeenMoments(store, sequences.input_ids.numel())

        def watch_stream(layer: int, stream: Tensor) -> None:
            seen.finish_layer(layer - 1)
            distances.see(layer, stream)

        influence = measure_influence(layers, sequences, watch=seen.see_input, watch_stream=watch_stream, progress=step)
        weights = weight_distances(pieces, arch, getattr(torch, model.dtype), step)
        if store is not None:
            store.sign(fingerprint, sequences.input_ids.numel(), "random tokens" if text is None else text.name)
        spectra = tuple(tie_spectra(pieces, arch, *way, settings.device, step) for way in ways)
    return Measurements(
        source=record,
        text=described,
        influence=influence,
        similarity=Similarity(weights=weights, streams=distances.found()),
        spectra=spectra,
        moments=tuple(seen.summaries),
        notes=tuple(note for note in (_describe(text),) if note is not None),
    )


def _describe(text: DataSource | None) -> str | None:
    return RANDOM_NOTE if text is None else describe_one_kind(text, "calibration")


def _draw(
    model: SourceModel, text: DataSource | None, settings: AnalysisSettings
) -> tuple[PackedSequence, MeasuredText]:
    context = min(settings.context, model.arch.max_position_embeddings)
    rows = max(1, settings.tokens // context)
    if text is None:
        generator = torch.Generator().manual_seed(settings.seed)
        ids = torch.randint(model.arch.vocab_size, (rows, context), generator=generator)
        drawn = PackedSequence(ids, torch.arange(context).expand(rows, -1), torch.full_like(ids, IGNORED))
    else:
        drawn = pack_calibration(
            text,
            load_tokenizer(model.source),
            sequence_length=context,
            num_fit=0,
            num_held_out=rows,
            seed=settings.seed,
            vocab_size=model.arch.vocab_size,
        ).held_out
    return drawn, MeasuredText(
        kind="random" if text is None else "text",
        name="random tokens" if text is None else text.name,
        tokens=drawn.input_ids.numel(),
        context=context,
        seed=settings.seed,
    )


class _SeenMoments:
    """Second moments of the current layer, summarised when the layer has run."""

    def __init__(self, store: MomentStore | None, tokens: int):
        self.summaries: list[Mapping[str, MomentSummary]] = []
        self._store, self._tokens, self._sums = store, tokens, MomentSums()

    def see_input(self, layer: int, linear: str, x: Tensor) -> None:
        self._sums.see_input(layer, linear, x)

    def finish_layer(self, layer: int) -> None:
        if layer < 0:
            return
        sums, self._sums = self._sums, MomentSums()
        if self._store is None:
            sums.divide(self._tokens)
        else:
            sums.store(self._store, layer, self._tokens)
        self.summaries.append({name: _summary(moment) for name, moment in sums.inputs.items()})


def _summary(moment: Tensor) -> MomentSummary:
    trace = float(moment.diagonal().double().sum())
    squared = float(torch.linalg.vector_norm(moment, dtype=torch.float64).square())
    return MomentSummary(trace=trace, participation_ratio=trace**2 / squared if squared else 0.0)
