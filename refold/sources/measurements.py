"""Measurements of a source: influence of each layer, spectra and similarities, as one file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from refold.checkpoint.atomic_file import write_text
from refold.checkpoint.folder import settle
from refold.checkpoint.locate import Source
from refold.errors import FolderError, SourceError
from refold.families.arch import Frozen
from refold.sources.source_model import SourceRecord


class Influence(Frozen):
    """Influence of each source layer: one minus the cosine similarity of the residual stream before and after it.

    The similarity is a mean over tokens. For whole layers this is the block influence of ShortGPT (arXiv 2403.03853,
    equation 1). For attention and MLP it is the importance of LLM-Drop (arXiv 2406.15786, section 3): the residual
    stream before and after the sub-layer's output, norms included, is added.
    """

    block: tuple[float, ...]
    attention: tuple[float, ...]
    mlp: tuple[float, ...]


MEASUREMENTS_NAME = "measurements.json"
MOMENTS_NAME = "moments"
FORMAT = 1

Matrix = tuple[tuple[float, ...], ...]


class MeasuredText(Frozen):
    """The input of the measurements."""

    kind: Literal["text", "random"]
    """`random`: tokens drawn uniformly from the vocabulary, if no text was given."""
    name: str
    tokens: int
    context: int
    """Tokens of each sequence."""
    seed: int


class Similarity(Frozen):
    """Distances between the layers of a source, by weights and by residual stream."""

    weights: Mapping[str, Matrix]
    """For each linear the distance |W_i - W_j| / sqrt(|W_i|^2 + |W_j|^2) of layers i and j: 0 equal, 1 orthogonal."""
    streams: Matrix
    """Angular distance, divided by pi, between the residual streams before layers i and j. The last row and column are
    for the stream after the last layer."""

    def pairs(self) -> list[tuple[float, int, int]]:
        """Returns pairs of layers with their weight distance, a mean over linears, most similar pair first."""
        tables = list(self.weights.values())
        size = len(tables[0])
        return sorted(
            (sum(table[one][other] for table in tables) / len(tables), one, other)
            for one in range(size)
            for other in range(one + 1, size)
        )


class LinearSpectrum(Frozen):
    """The tying error of one linear, over all groups of tied layers."""

    lost: float
    """Tying error: the share of the weights' energy (squared Frobenius norm) outside the mean of each group."""
    kept: tuple[float, ...]
    """Share of the tying error that the best LoRA of each rank restores."""


class TyingSpectra(Frozen):
    """The tying errors of all linears for one way to tie layers."""

    pattern: Literal["cycle", "sequence"]
    loops: int
    groups: tuple[tuple[int, ...], ...]
    """For each stored layer the source layers tied to it."""
    shares: tuple[float, ...]
    """Ranks for `kept`, as shares of the full rank of a linear."""
    linears: Mapping[str, LinearSpectrum]


class MomentSummary(Frozen):
    """Two numbers about the second moment C = E[x x^T] of the inputs x of a linear."""

    trace: float
    """tr C: the mean squared length of the inputs."""
    participation_ratio: float
    """(tr C)^2 / tr C^2: the effective number of directions of the inputs, from 1 to their size."""


class Measurements(Frozen):
    """All measurements of one source."""

    format: Literal[1] = FORMAT
    source: SourceRecord
    text: MeasuredText
    influence: Influence
    similarity: Similarity
    spectra: tuple[TyingSpectra, ...] = ()
    moments: tuple[Mapping[str, MomentSummary], ...] = Field(default=())
    """For each layer the summaries by linear; linears with the same input are listed under the first one's name."""
    notes: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Writes the measurements atomically into a folder.

        Raises:
            FolderError: The file cannot be written.
        """
        write_text(folder / MEASUREMENTS_NAME, self.model_dump_json(indent=1) + "\n")


def read_measurements(path: str | Path, source: Source) -> Measurements:
    """Reads measurements of a source.

    Args:
        path: The file, or the folder that `refold analyse` wrote.
        source: The source that the measurements must belong to.

    Raises:
        FolderError: The measurements are missing or damaged.
        SourceError: The measurements belong to another source.
    """
    path = settle(path)
    path = path / MEASUREMENTS_NAME if path.is_dir() else path
    try:
        found = Measurements.model_validate_json(path.read_bytes())
    except OSError as error:
        raise FolderError(
            f"{path}: measurements are required ({error.strerror}); make them with `refold analyse SOURCE --out DIR`"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(key) for key in first["loc"])
        raise FolderError(
            f"{path}: measurements of format {FORMAT} are required ({where + ': ' if where else ''}{first['msg']}); "
            f"analyse again"
        ) from None
    if not found.source.is_of(source):
        other = found.source.path or found.source.id
        raise SourceError(
            f"{path}: measurements of {source.where} are required (got those of {other}, whose config or tensors "
            f"differ); analyse this one"
        )
    return found


def stored_moments(measurements: str | Path | None) -> Path | None:
    """Returns the folder of moments beside the measurements; None if there is none."""
    if measurements is None:
        return None
    path = Path(measurements)
    folder = (path if path.is_dir() else path.parent) / MOMENTS_NAME
    return folder if folder.is_dir() else None
