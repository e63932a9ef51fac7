"""The record of a scorecard, one JSON file for each model; every section has its record here."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from refold.checkpoint.atomic_file import write_json
from refold.evaluation import result
from refold.evaluation.result import FORMAT, Evaluation, Machine, ModelFacts

FILE_NAME = "scorecard.json"


class ScoreRecord(BaseModel):
    """A part of a scorecard."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class TaskScore(ScoreRecord):
    """The score of one few-shot task."""

    name: str
    metric: str
    """Name of the headline metric, as lm-eval calls it: `acc`, `acc_norm`."""
    value: float
    error: float | None
    """Standard error over items; None with fewer than two."""
    chance: float | None
    """Value of random answers; None where there is none, as for a free word."""
    metrics: dict[str, float]
    """All metrics of the task by lm-eval's name, headline included."""
    shots: int
    num_items: int
    num_available: int
    """Items of the task before the limit."""
    version: str
    items: tuple[str, ...]
    """A short hash of each item's question, in the order of `right`: pairs the items of two scorecards."""
    right: tuple[float, ...]
    """Headline metric of each item."""


class TaskSection(ScoreRecord):
    """Few-shot tasks."""

    tasks: tuple[TaskScore, ...]
    average: float
    """Mean of the headline metrics over tasks, each task with the same weight."""
    average_error: float | None
    """Standard error of the mean, tasks independent."""
    harness: str
    """lm-eval and its version."""
    seconds: float


class RecallScore(ScoreRecord):
    """Accuracy of one kind of recall at one length, or at one depth of the needle."""

    kind: str
    """`associative`, `passkey`, `copying` or `verbatim`."""
    length: int
    """Tokens of the context."""
    depth: float | None
    """Place of the needle in the context, 0 its start and 1 its end; None where there is none."""
    accuracy: float
    """Share of answer tokens that are the model's likeliest, by teacher forcing: after the right tokens before them."""
    exact: float
    """Share of answers that are right as a whole."""
    chance: float | None = None
    """Accuracy of an answer that is drawn from the words it may be; None where the answer is free text."""
    num_items: int
    error: float | None
    """Standard error of `accuracy` over items."""
    gain: float | None = None
    """Nats by which an answer token is likelier than the same token at its earlier mention; None where the text before
    the answer does not hold it."""
    gain_error: float | None = None
    items: tuple[str, ...] = ()
    """A short hash of each item's tokens, in the order of `right`: pairs the items of two scorecards."""
    right: tuple[float, ...]
    """Accuracy of each item; items of one seed are the same for all models of one tokenizer."""


class RecallSection(ScoreRecord):
    """Recall on texts made on the spot."""

    scores: tuple[RecallScore, ...]
    notes: tuple[str, ...] = ()
    """Lengths and kinds that were skipped, with the reason."""
    seed: int
    seconds: float


class ExitChoice(ScoreRecord):
    """Quality and depth of one rule for leaving."""

    rule: str
    """`full depth`, `exit after N`, `oracle`, `thresholds at TOLERANCE` or `calibrated at TOLERANCE`."""
    mean_depths: float
    """Depths run for a token on average."""
    bits_per_byte: float
    difference: float = 0.0
    """Bits per byte minus those of the full depth, on the same text."""
    difference_error: float | None = None
    """Standard error over documents."""
    agreement: float
    """Share of tokens whose likeliest token is that of the full depth."""
    agreement_error: float | None = None
    """Standard error over documents."""
    accuracy: float
    shares: tuple[float, ...] = ()
    """Share of tokens that leave at each exit, the full depth last."""
    nats: tuple[float, ...] = ()
    """Negative log-likelihood of each document of `ExitSection.documents`; empty: not recorded."""


class ExitSection(ScoreRecord):
    """Quality and depth by rule for leaving."""

    depths: tuple[int, ...]
    """Depths before each exit."""
    num_depths: int
    choices: tuple[ExitChoice, ...]
    num_documents: int = 0
    """Documents that the figures are of; none of them chose a threshold."""
    num_tokens: int = 0
    documents: tuple[str, ...] = ()
    """A short hash of the tokens of each of these documents: pairs the documents of two scorecards."""
    bytes: tuple[int, ...] = ()
    """UTF-8 bytes of each of them that are scored."""
    notes: tuple[str, ...] = ()


class BranchScore(ScoreRecord):
    """Text loss of a hybrid without one of its branches."""

    branch: str
    """Such as `all attention`, `all linear_attention: window` or `depth 2: attention`."""
    bits_per_byte: float
    difference: float
    """Bits per byte minus those of the whole model, on the same text."""
    difference_error: float | None
    """Standard error of the difference over documents; None with fewer than two."""
    num_documents: int = 0


class NoiseScore(ScoreRecord):
    """Loss on the clean second half of a text after a noisy first half."""

    kind: str
    """Kind of noise, such as `swapped letters`; `no first half` shows the worth of the whole first half."""
    share: float
    """Share of changed characters or words."""
    bits_per_byte: float
    difference: float
    """Bits per byte minus those after the clean first half."""
    difference_error: float | None
    """Standard error of the difference over documents; None with fewer than two."""
    num_documents: int = 0


class SpeedSection(ScoreRecord):
    """Speed and memory of one stream."""

    prompt_tokens: int
    new_tokens: int
    first_token: float
    """Seconds from the prompt to the first token, median."""
    tokens_per_second: float
    """Tokens after the first for each second, median."""
    speed_range: tuple[float, float] | None = None
    """Lower and upper quartile of tokens per second."""
    peak_memory: int | None
    """Most bytes that a process which runs this model alone holds, weights and libraries included; on a GPU most bytes
    of tensors. None where it cannot be measured; `notes` has the reason."""
    base_memory: int | None = None
    """Bytes of that process before it loads the model."""
    weight_bytes: int
    """Bytes of the weights as they are held in memory."""
    state_bytes: int
    """Bytes of cache and states after prompt and new tokens."""
    batch_tokens_per_second: dict[int, float] = {}
    """New tokens for each second over all rows, prompts included in the time, by rows; medians."""
    ratio: float | None = None
    """Tokens per second over those of the source, within rounds, median; None without a source."""
    ratio_range: tuple[float, float] | None = None
    """Lower and upper quartile of the ratio."""
    notes: tuple[str, ...] = ()
    repeats: int
    threads: int
    dtype: str
    against: "SpeedSection | None" = None
    """The source, measured in turns with the model in one process."""


class NotRun(ScoreRecord):
    """A section that was asked for and could not run."""

    section: str
    why: str


class Scorecard(ScoreRecord):
    """All measurements of one model."""

    format: int = FORMAT
    model: ModelFacts
    text: Evaluation | None = None
    tasks: TaskSection | None = None
    recall: RecallSection | None = None
    exits: ExitSection | None = None
    branches: tuple[BranchScore, ...] = ()
    noise: tuple[NoiseScore, ...] = ()
    speed: SpeedSection | None = None
    not_run: tuple[NotRun, ...] = ()
    settings: dict[str, Any]
    """Settings that the figures depend on."""
    machine: Machine
    versions: dict[str, str]
    command: str = ""
    time: str

    def write(self, path: str | Path, overwrite: bool = False) -> Path:
        """Writes the scorecard to a file, atomically, and returns the file's path.

        Args:
            path: The file, or a folder for `scorecard.json`.
            overwrite: Replace an older scorecard or evaluation; other files are never replaced.

        Raises:
            FolderError: The file exists, or cannot be written.
        """
        path = require_free_scorecard(path, overwrite)
        write_json(path, self.model_dump(mode="json"))
        return path


def require_free_scorecard(path: str | Path, overwrite: bool = False) -> Path:
    """Checks that a scorecard can be written to a file, and returns its path; arguments as `Scorecard.write`.

    Raises:
        FolderError: A file exists that must not be replaced.
    """
    return result.require_free_record(path, FILE_NAME, read_scorecard, overwrite)


def read_scorecard(path: str | Path) -> Scorecard:
    """Reads a file of `refold evaluate`, also one of format 1, which is an evaluation of text alone.

    Args:
        path: The file, or a folder with `scorecard.json` or `evaluation.json`.

    Raises:
        FolderError: The file does not exist, is of a newer format, or is no such file.
    """
    path = Path(path)
    if path.is_dir():
        older = path / result.FILE_NAME
        path = older if older.is_file() and not (path / FILE_NAME).exists() else path / FILE_NAME
    raw = result.read_record(path, "scorecard")
    if _is_evaluation(raw):
        return from_evaluation(result.parse_record(path, raw, Evaluation, "a scorecard"))
    return result.parse_record(path, raw, Scorecard, "a scorecard")


def from_evaluation(found: Evaluation) -> Scorecard:
    """Returns a scorecard with text alone."""
    facts = {"machine": found.machine, "versions": found.versions, "time": found.time}
    return Scorecard(model=found.model, text=found, settings={}, **facts)


def _is_evaluation(raw: bytes) -> bool:
    try:
        plain = json.loads(raw)
    except ValueError:
        return False
    return isinstance(plain, dict) and "bits_per_byte" in plain
