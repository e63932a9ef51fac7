"""The result of an evaluation, written as `evaluation.json`: figures, model, data and machine."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from refold.checkpoint.atomic_file import require_free, write_json
from refold.errors import FolderError

R = TypeVar("R", bound=BaseModel)

FILE_NAME = "evaluation.json"
FORMAT = 2
"""Format of the files of evaluations and scorecards; 1 had no sums by document."""
HASH_LETTERS = 10
"""Hexadecimal letters of a short hash: among 10,000 documents, two share a hash with a chance of 1 in 20,000."""
NAT_DIGITS = 4
"""Decimal places of the stored nats of a document, which are then within 5e-5 of the exact ones."""


def short_hash(content: bytes) -> str:
    """Returns a short hash by which two files pair their documents or items, or tell their vocabularies apart."""
    return hashlib.blake2b(content).hexdigest()[:HASH_LETTERS]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelFacts(_Record):
    """Facts about a model."""

    name: str
    """Folder or hub id; for a loaded model, the name in its config."""
    model_type: str
    parameters: int
    """Number of stored parameters; tied parameters count once."""
    weight_bytes: int
    """Bytes of the stored weights."""
    dtype: str
    """Dtype of the stored weights."""
    computed_in: str = ""
    """Dtype of the computation; it differs from the weights' dtype if that is slow on the machine."""
    quantised: str | None = None
    """Scheme that the weights of linears were rounded to; `weight_bytes` then counts integers and scales."""
    source: dict[str, Any] = {}
    """`path` or `id`, `revision` and `fingerprint`; empty for a model in memory."""
    fitted_to: tuple[str, ...] = ()
    """Names of the texts that the model was calibrated or healed on, by its provenance."""
    tokenizer: str = ""
    """A short hash of the tokens and their ids; empty: no tokenizer, or a file of format 1."""


class DataFile(_Record):
    """One file of the data, or documents in memory under their name."""

    name: str
    bytes: int
    sha256: str


class ExitScores(_Record):
    """Scores of the predictions at an early exit."""

    depths: int
    """Number of depths before the exit."""
    bits_per_byte: float
    perplexity: float
    accuracy: float
    agreement: float
    """Share of tokens where exit and full depth have the same likeliest token."""
    kl: float
    """`KL(full depth || exit)`, nats per token."""
    gate_accuracy: float | None = None
    """Share of tokens where the gate, at one half, predicts correctly whether they agree; None without a gate."""


class Comparison(_Record):
    """Comparison with another model of the same vocabulary, on the same windows."""

    model: ModelFacts
    """The other model: usually the source."""
    bits_per_byte: float
    """Bits per byte of the other model."""
    bits_per_byte_error: float | None
    perplexity: float
    accuracy: float
    difference: float
    """Bits per byte of the evaluated model minus those of the other: above 0 is worse."""
    difference_error: float | None
    """Standard error of the difference, documents paired; None with fewer than two documents."""
    agreement: float
    """Share of scored tokens where both models have the same likeliest token."""
    kl: float
    """`KL(other || evaluated)`, nats per scored token."""
    kept_tokens: int | None = None
    """Size of the evaluated model's vocabulary if it is a part of the other's. Agreement and KL are then over the kept
    tokens, the other model's probabilities renormalised, on the evaluated model's tokens of the text; the other model's
    bits per byte, perplexity and accuracy are those of its own tokens and whole vocabulary. None: one vocabulary."""


class KindScores(_Record):
    """Scores of one kind of text: one of several data sources side by side."""

    name: str
    documents: int
    tokens: int
    """Scored tokens."""
    bytes: int
    bits_per_byte: float
    bits_per_byte_error: float | None
    perplexity: float
    accuracy: float
    rows: tuple[int, int] | None = None
    """Its documents in `Evaluation.by_document`: the first, and the one after the last."""
    difference: float | None = None
    """Bits per byte minus those of the other model."""
    difference_error: float | None = None
    agreement: float | None = None
    kl: float | None = None


class DocumentScores(_Record):
    """Sums of each document, in the order of the data; they pair two evaluations of one text."""

    hashes: tuple[str, ...]
    """A short hash of each document's text, the last one cut where `max_tokens` cuts it."""
    bytes: tuple[int, ...]
    """UTF-8 bytes of the scored tokens; 0 for a document without a scored token."""
    tokens: tuple[int, ...]
    """Scored tokens."""
    right: tuple[int, ...]
    """Scored tokens that are the model's likeliest token."""
    nats: tuple[float, ...]
    """Negative log-likelihood, rounded to four decimal places."""

    @model_validator(mode="after")
    def _have_one_length(self) -> "DocumentScores":
        counts = sorted({len(each) for each in (self.hashes, self.bytes, self.tokens, self.right, self.nats)})
        if len(counts) > 1:
            raise ValueError(f"lists of one length are required (got {counts[0]} to {counts[-1]} documents)")
        return self


class Seconds(_Record):
    """Seconds spent by each part of the evaluation."""

    load: float
    """Loading models and tokenizers."""
    tokenise: float
    """Reading, hashing and tokenising the data."""
    model: float
    """Forward passes of the evaluated model, head excluded."""
    against: float
    """Forward passes of the other model, head excluded."""
    score: float
    """Heads and scores."""


class Machine(_Record):
    """The machine that ran the evaluation."""

    device: str
    device_name: str
    """Name of the accelerator; for a CPU the processor architecture."""
    cpus: int
    torch_threads: int
    system: str


class Evaluation(_Record):
    """One evaluation.

    Standard errors treat documents as independent samples and the figure as a ratio of sums (delta method). Documents
    that are pieces of one book are not independent, so the true error is somewhat larger.
    """

    format: int = FORMAT
    model: ModelFacts
    data: tuple[DataFile, ...]
    is_whole_data: bool
    """Whether all documents were used; False if `max_tokens` cut the data."""
    max_tokens: int | None
    context: int
    """Tokens in a window."""
    stride: int
    """Tokens scored by each window of a document after its first."""
    documents: int
    """Number of documents with at least one scored token."""
    tokens: int
    """Scored tokens."""
    bytes: int
    """UTF-8 bytes of the scored tokens."""
    bits_per_byte: float
    bits_per_byte_error: float | None
    """Standard error over documents; None with fewer than two documents."""
    perplexity: float
    """Per token of this model's tokenizer."""
    accuracy: float
    """Share of scored tokens that are the model's likeliest token."""
    exits: tuple[ExitScores, ...] = ()
    """Scores at each exit of the blueprint, first to last."""
    kinds: tuple[KindScores, ...] = ()
    """Scores of each of several data sources; the figures above are over all of them."""
    against: Comparison | None = None
    by_document: DocumentScores | None = None
    """None in files of format 1."""
    notes: tuple[str, ...] = ()
    """Lines on the choice of the text, such as an evaluation on the calibration text's kind alone."""
    seconds: Seconds
    tokens_per_second: float
    """Scored tokens divided by the seconds of forward passes and scores."""
    batch_size: int
    machine: Machine
    versions: dict[str, str]
    time: str
    """Local time with offset."""

    def write(self, path: str | Path, overwrite: bool = False) -> Path:
        """Writes the evaluation to a file, atomically, and returns the file's path.

        Args:
            path: The file, or a folder for `evaluation.json`.
            overwrite: Replace an older evaluation; other files are never replaced.

        Raises:
            FolderError: The file exists, or cannot be written.
        """
        path = require_free_evaluation(path, overwrite)
        write_json(path, self.model_dump(mode="json"))
        return path


def require_free_evaluation(path: str | Path, overwrite: bool = False) -> Path:
    """Checks that an evaluation can be written to a file, and returns its path; arguments as `Evaluation.write`.

    Raises:
        FolderError: A file exists that must not be replaced.
    """
    return require_free_record(path, FILE_NAME, read_evaluation, overwrite)


def require_free_record(path: str | Path, name: str, read: Callable[[Path], Any], overwrite: bool) -> Path:
    """Checks that a record of `refold evaluate` can be written, and returns its path.

    Args:
        path: The file, or a folder.
        name: Name of the file in a folder.
        read: Reads a record that may be replaced; raises FolderError for other files.
        overwrite: Replace such a record.

    Raises:
        FolderError: A file exists that must not be replaced.
    """

    def is_own(file: Path) -> bool:
        try:
            read(file)
        except FolderError:
            return False
        return True

    path = Path(path)
    return require_free(path / name if path.is_dir() else path, "report of `evaluate`", is_own, overwrite)


def read_evaluation(path: str | Path) -> Evaluation:
    """Reads the file of an evaluation, or `evaluation.json` in a folder.

    Raises:
        FolderError: The file does not exist, or it is not an evaluation.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    return parse_record(path, read_record(path, "evaluation"), Evaluation, "an evaluation")


def read_record(path: Path, kind: str) -> bytes:
    """Returns the bytes of a file of `refold evaluate`.

    Args:
        path: The file.
        kind: Name of such files in messages.

    Raises:
        FolderError: The file cannot be read, or its format is newer than this version of refold.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise FolderError(f"{path}: a readable {kind} is required ({error.strerror}); evaluate first") from error
    try:
        plain = json.loads(raw)
    except ValueError:
        return raw
    found = plain.get("format") if isinstance(plain, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise FolderError(f"{path}: format {found} is newer than this refold reads ({FORMAT}); update refold")
    require_numbers(path, plain)
    return raw


def require_numbers(path: Path, plain: Any) -> None:
    """Checks that no figure of a file is NaN, which would pass every comparison and spoil every average.

    Args:
        path: The file, for the message.
        plain: Its plain data.

    Raises:
        FolderError: A figure is NaN.
    """
    where = _find_nan(plain)
    if where is not None:
        raise FolderError(f"{path}: {where[1:]}: a number is required (got NaN); check the model and evaluate again")


def _find_nan(plain: Any) -> str | None:
    """Returns the place of a NaN in plain data, as `.text.bits_per_byte`."""
    if isinstance(plain, float):
        return "" if math.isnan(plain) else None
    members = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    return next((f".{key}{rest}" for key, each in members if (rest := _find_nan(each)) is not None), None)


def parse_record(path: Path, raw: bytes, kind: type[R], name: str) -> R:
    """Returns the record of a file's bytes.

    Raises:
        FolderError: They are no such record.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(key) for key in first["loc"])
        raise FolderError(
            f"{path}: {name} is required ({where + ': ' if where else ''}{first['msg']}); evaluate again"
        ) from error
