"""`evaluation.json`: what was measured, on what, by which model, where."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from refold.checkpoint.atomic_file import require_free, write_text
from refold.errors import FolderError

FILE_NAME = "evaluation.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class ModelFacts(_Record):
    """Which model."""

    name: str
    """Folder or hub id; of a model handed over in memory what it says it was loaded from."""
    model_type: str
    parameters: int
    """Numbers stored; tied ones count once."""
    weight_bytes: int
    """As stored."""
    dtype: str
    """Of the stored weights."""
    computed_in: str = ""
    """What it was computed in: another dtype than the weights' where that is slow on the machine."""
    quantised: str | None = None
    """Scheme to which the weights of linears were rounded; `weight_bytes` are then those of integers and scales."""
    source: dict[str, Any] = {}
    """`path` or `id`, `revision` and `fingerprint`; empty for a model in memory."""


class DataFile(_Record):
    """One file of the data, or documents in memory under the name they were given."""

    name: str
    bytes: int
    sha256: str


class ExitScores(_Record):
    """How well the stack predicts when it is left early."""

    depths: int
    """Number of depths that ran."""
    bits_per_byte: float
    perplexity: float
    accuracy: float
    agreement: float
    """Share of tokens where its likeliest token is that of the full depth."""
    kl: float
    """`KL(full depth || exit)`, nats per token."""
    gate_accuracy: float | None = None
    """Share of tokens where its gate says rightly whether they agree (at one half); None without a gate."""


class Comparison(_Record):
    """The model beside another with the same vocabulary, on the same windows."""

    model: ModelFacts
    """The other model: usually the source."""
    bits_per_byte: float
    """The other model's own."""
    bits_per_byte_error: float | None
    perplexity: float
    accuracy: float
    difference: float
    """Bits per byte of the evaluated model minus those of the other: above 0 is worse."""
    difference_error: float | None
    """Standard error of the difference, documents paired; None with fewer than two documents."""
    agreement: float
    """Share of scored tokens where both have the same likeliest token."""
    kl: float
    """`KL(other || evaluated)`, nats per scored token."""


class KindScores(_Record):
    """How well a model predicts one of several kinds of text: one of the files or data sets named side by side."""

    name: str
    documents: int
    tokens: int
    """Scored tokens."""
    bytes: int
    bits_per_byte: float
    bits_per_byte_error: float | None
    perplexity: float
    accuracy: float
    difference: float | None = None
    """Bits per byte minus those of the model compared with."""
    difference_error: float | None = None
    agreement: float | None = None
    kl: float | None = None


class Seconds(_Record):
    """Where the time went."""

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
    """Where it ran."""

    device: str
    device_name: str
    """Of an accelerator; for the CPU the processor architecture."""
    cpus: int
    torch_threads: int
    system: str


class Evaluation(_Record):
    """One evaluation.

    Standard errors treat documents as independent draws and the figure as a ratio of sums (delta method). Documents
    that are pieces of one book resemble each other, so the true error is somewhat larger than theirs.
    """

    format: int = 1
    model: ModelFacts
    data: tuple[DataFile, ...]
    is_whole_data: bool
    """Whether all documents were used; False where `max_tokens` cut them."""
    max_tokens: int | None
    context: int
    """Tokens a window may hold."""
    stride: int
    """Tokens scored by each window of a document after its first."""
    documents: int
    """Documents of which at least one token was scored."""
    tokens: int
    """Scored tokens."""
    bytes: int
    """UTF-8 bytes these tokens stand for."""
    bits_per_byte: float
    bits_per_byte_error: float | None
    """Standard error over documents; None with fewer than two."""
    perplexity: float
    """Per token of this model's tokenizer."""
    accuracy: float
    """Share of scored tokens that are the model's likeliest."""
    exits: tuple[ExitScores, ...] = ()
    """For each exit of the blueprint, top to bottom."""
    kinds: tuple[KindScores, ...] = ()
    """Of data named side by side, each by itself; the figures above are over all of it."""
    against: Comparison | None = None
    seconds: Seconds
    tokens_per_second: float
    """Scored tokens by the seconds of forward passes and scores."""
    batch_size: int
    machine: Machine
    versions: dict[str, str]
    time: str
    """Local time with offset."""

    def write(self, path: str | Path, overwrite: bool = False) -> Path:
        """Writes the evaluation, whole or not at all, and returns the file's path.

        Args:
            path: The file, or a folder that gets an `evaluation.json`.
            overwrite: Replace an older evaluation; a file of anything else is refused all the same.

        Raises:
            FolderError: The file exists, or cannot be written.
        """
        path = require_free_evaluation(path, overwrite)
        write_text(path, self.model_dump_json(indent=2) + "\n")
        return path


def require_free_evaluation(path: str | Path, overwrite: bool = False) -> Path:
    """Checks that an evaluation can be written to a file, and returns its path; arguments as `Evaluation.write`.

    Raises:
        FolderError: Something is there that must not be replaced.
    """
    path = Path(path)
    return require_free(path / FILE_NAME if path.is_dir() else path, "report of `evaluate`", _is_evaluation, overwrite)


def _is_evaluation(path: Path) -> bool:
    try:
        read_evaluation(path)
    except FolderError:
        return False
    return True


def read_evaluation(path: str | Path) -> Evaluation:
    """Reads what `Evaluation.write` wrote; a folder stands for the `evaluation.json` in it.

    Raises:
        FolderError: There is no such file, or it is not an evaluation.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        return Evaluation.model_validate_json(path.read_bytes())
    except OSError as error:
        raise FolderError(f"{path}: a readable evaluation is required ({error.strerror}); evaluate first") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(key) for key in first["loc"])
        raise FolderError(
            f"{path}: an evaluation is required ({where + ': ' if where else ''}{first['msg']}); evaluate again"
        ) from error
