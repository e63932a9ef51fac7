"""The result of an evaluation, written as `evaluation.json`: figures, model, data and machine."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from refold.checkpoint.atomic_file import require_free, write_text
from refold.errors import FolderError

FILE_NAME = "evaluation.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


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
    difference: float | None = None
    """Bits per byte minus those of the other model."""
    difference_error: float | None = None
    agreement: float | None = None
    kl: float | None = None


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

    format: int = 1
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
        write_text(path, self.model_dump_json(indent=2) + "\n")
        return path


def require_free_evaluation(path: str | Path, overwrite: bool = False) -> Path:
    """Checks that an evaluation can be written to a file, and returns its path; arguments as `Evaluation.write`.

    Raises:
        FolderError: A file exists that must not be replaced.
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
    """Reads the file of an evaluation, or `evaluation.json` in a folder.

    Raises:
        FolderError: The file does not exist, or it is not an evaluation.
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
