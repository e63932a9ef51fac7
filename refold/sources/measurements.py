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
    """One minus the cosine similarity of the stream before and after, a mean over tokens, by source layer.

    Of whole layers it is ShortGPT's block influence (arXiv 2403.03853, equation 1). Of sub-layers it is LLM-Drop's
    importance (arXiv 2406.15786, section 3): the stream against the stream plus what the sub-layer adds, with the norms
    that belong to it.
    """

    block: tuple[float, ...]
    attention: tuple[float, ...]
    mlp: tuple[float, ...]


MEASUREMENTS_NAME = "measurements.json"
MOMENTS_NAME = "moments"
FORMAT = 1

Matrix = tuple[tuple[float, ...], ...]


class MeasuredText(Frozen):
    """What a source was run on."""

    kind: Literal["text", "random"]
    """`random`: tokens drawn evenly from the vocabulary, for want of text."""
    name: str
    tokens: int
    context: int
    """Tokens of each sequence."""
    seed: int


class Similarity(Frozen):
    """How alike layers are."""

    weights: Mapping[str, Matrix]
    """By linear, |W_i - W_j| / sqrt(|W_i|^2 + |W_j|^2) of layers i and j: 0 equal, 1 nothing in common."""
    streams: Matrix
    """Angular distance, of pi, between the streams before layers i and j; the last row and column stand for the end."""

    def pairs(self) -> list[tuple[float, int, int]]:
        """Returns pairs of layers with the mean weight distance over linears, most alike first."""
        tables = list(self.weights.values())
        size = len(tables[0])
        return sorted(
            (sum(table[one][other] for table in tables) / len(tables), one, other)
            for one in range(size)
            for other in range(one + 1, size)
        )


class LinearSpectrum(Frozen):
    """What tying does to one linear, over all layers that are tied."""

    lost: float
    """Share of the weights' energy (squared Frobenius norm) that the mean of each group does not hold."""
    kept: tuple[float, ...]
    """Share of what is lost that the best LoRA of each rank holds."""


class TyingSpectra(Frozen):
    """What one way of tying would lose."""

    pattern: Literal["cycle", "sequence"]
    loops: int
    groups: tuple[tuple[int, ...], ...]
    """Source layers tied to one stored layer each."""
    shares: tuple[float, ...]
    """Ranks of `kept`, as shares of each linear's full rank."""
    linears: Mapping[str, LinearSpectrum]


class MomentSummary(Frozen):
    """The second moment C = E[x x^T] of what a linear sees, in two numbers."""

    trace: float
    """tr C: the mean squared length of the inputs."""
    participation_ratio: float
    """(tr C)^2 / tr C^2: how many directions the inputs use, from 1 to their size."""


class Measurements(Frozen):
    """Everything measured of one source."""

    format: Literal[1] = FORMAT
    source: SourceRecord
    text: MeasuredText
    influence: Influence
    similarity: Similarity
    spectra: tuple[TyingSpectra, ...] = ()
    moments: tuple[Mapping[str, MomentSummary], ...] = Field(default=())
    """By layer and linear, the linears that share an input under the name of the first."""
    notes: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Writes them into a folder, whole or not at all.

        Raises:
            FolderError: The file cannot be written.
        """
        write_text(folder / MEASUREMENTS_NAME, self.model_dump_json(indent=1) + "\n")


def read_measurements(path: str | Path, source: Source) -> Measurements:
    """Reads measurements of a source.

    Args:
        path: The file, or the folder `refold analyse` wrote.
        source: Whose they have to be.

    Raises:
        FolderError: There are none, or they are damaged.
        SourceError: They are another source's.
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
    """Returns the folder of moments that stands with measurements; None where there is none."""
    if measurements is None:
        return None
    path = Path(measurements)
    folder = (path if path.is_dir() else path.parent) / MOMENTS_NAME
    return folder if folder.is_dir() else None
