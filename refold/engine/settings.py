"""Settings of an engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from refold.errors import RefoldError
from refold.suggest import must_be_one_of

if TYPE_CHECKING:
    from refold.engine.exits import ExitRule
    from refold.engine.thresholds import Thresholds

KvPolicy = Literal["shared", "propagate", "recompute"]
KV_POLICIES = ("shared", "propagate", "recompute")
WEIGHTS = ("auto", "float32", "bfloat16", "int8", "int4")
PREEMPTIONS = ("recompute", "copy")
SPLITS = ("heads", "rows")


@dataclass(frozen=True)
class Drafts:
    """Lossless drafting: cheap guesses that one launch of the whole stack verifies.

    Attributes:
        source: `exit`: the first exit, or the one after `depth` depths, drafts; `lookup`: tokens that followed the
            same words before, in the prompt and the text so far.
        tokens: Maximal number of tokens of a row that one launch verifies.
        depth: Number of depths that draft; None: those before the first exit, or the first loop.
        adapt: Draft fewer tokens where few are accepted, and none where drafting does not pay.
    """

    source: str = "exit"
    tokens: int = 4
    depth: int | None = None
    adapt: bool = True

    def __post_init__(self) -> None:
        if self.source not in ("exit", "lookup"):
            raise RefoldError(f"drafts.source: {must_be_one_of(self.source, ('exit', 'lookup'))}")
        if not 1 <= self.tokens <= 64:
            raise RefoldError(f"drafts.tokens: must lie in 1..64 (got {self.tokens})")


@dataclass(frozen=True)
class AttentionWorkers:
    """Processes that hold keys and values, and compute attention, for the process that has the model.

    Attributes:
        processes: Number of processes to start on this host; 0: none, `addresses` names them.
        addresses: HOST:PORT of workers that were started with `refold worker`, on this host or others.
        split: A worker holds some key-value heads of all sequences (`heads`), or all heads of some sequences (`rows`).
        overlap: Whether a launch runs as two halves, so that the model computes for one while the workers attend for
            the other.
        timeout: Seconds that one answer may take before the worker counts as lost.
        threads: CPU threads of each process that is started; None: an equal share of the processors.

    Raises:
        RefoldError: A setting is out of range.
    """

    processes: int = 0
    addresses: tuple[str, ...] = ()
    split: Literal["heads", "rows"] = "heads"
    overlap: bool = False
    timeout: float = 60.0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise RefoldError(f"attention_workers.split: {must_be_one_of(self.split, SPLITS)}")
        if (self.processes > 0) == bool(self.addresses) or self.processes < 0:
            raise RefoldError(
                f"attention_workers: processes or addresses are required, and not both (got {self.processes} processes "
                f"and {len(self.addresses)} addresses)"
            )
        if len(set(self.addresses)) < len(self.addresses):
            raise RefoldError("attention_workers.addresses: different addresses are required (got one twice)")
        if not self.timeout > 0:
            raise RefoldError(f"attention_workers.timeout: more than 0 seconds are required (got {self.timeout})")
        if self.threads is not None and self.threads < 1:
            raise RefoldError(f"attention_workers.threads: at least 1 is required (got {self.threads})")

    @property
    def count(self) -> int:
        """Number of workers."""
        return self.processes or len(self.addresses)


@dataclass(frozen=True)
class EngineSettings:
    """Settings of one engine.

    Attributes:
        weights: Form of the weights in memory: `float32`, `bfloat16`, `int8`, `int4`; `auto`: as stored, or float32
            where that is slow. Weights that are stored as integers stay as they are, except with a dtype.
        memory: Bytes for keys, values and states; None: what `max_rows` full contexts need, at most half of the free
            memory.
        page_size: Tokens of a page.
        max_rows: Maximal number of sequences that run at once.
        max_context: Maximal number of tokens of a sequence, prompt included; None: the model's positions.
        chunk: Maximal number of tokens of a launch; longer prompts are read in pieces.
        max_queue: Maximal number of waiting requests; None: no limit.
        max_wait: Maximal number of launches that a ready row may watch before its pass runs next.
        policy: Name of the rule that chooses the pass that runs next: `fullest`, `coda` or `oldest`.
        min_coda: For `coda`: rows that must be ready before the last pass goes first.
        join_loops: Whether requests join the others at every loop instead of at every token: a new request waits less,
            but there are more launches of fewer depths; None: where a running row may leave, or drafts are on.
        exits: None: every token runs the full depth. `calibrated`: thresholds beside the model. Or thresholds, or a
            rule.
        exit_tolerance: Tolerance of requests that ask for none: the largest calibrated one that is not above it; 0:
            they run the full depth; None: the one that calibration names.
        kv: Keys and values of depths that a token skipped: `shared` (the stack needs none), `propagate` (computed from
            the stream at the exit) or `recompute` (computed exactly, together with the next token that goes deeper);
            None: `shared` where the stack allows it, else `recompute`.
        max_pending: For `recompute`: maximal number of skipped tokens of a row that wait.
        drafts: Lossless drafting; None: off. Exits are not taken with it.
        share_prefixes: Whether equal beginnings of prompts share pages.
        preemption: Where memory runs out, a row gives its pages back and later computes them anew (`recompute`) or
            gets a copy back (`copy`).
        threads: CPU threads; None: as torch is set.
        keep_dense: Whether bfloat16 weights may be kept beside packed ones, for launches of many rows.
        attention_workers: Processes that hold keys and values and compute attention; None: this process does.
        kv_device: Device that holds keys and values and computes attention; None: the model's.

    Raises:
        RefoldError: A setting is out of range.
    """

    weights: str = "auto"
    memory: int | None = None
    page_size: int = 32
    max_rows: int = 32
    max_context: int | None = None
    chunk: int = 512
    max_queue: int | None = None
    max_wait: int = 64
    policy: str = "fullest"
    min_coda: int = 8
    join_loops: bool | None = None
    exits: "Thresholds | ExitRule | Path | Literal['calibrated'] | None" = None
    exit_tolerance: float | None = None
    kv: str | None = None
    max_pending: int = 32
    drafts: Drafts | None = None
    share_prefixes: bool = True
    preemption: str = "recompute"
    threads: int | None = None
    keep_dense: bool = True
    attention_workers: AttentionWorkers | None = None
    kv_device: str | None = None

    def __post_init__(self) -> None:
        for name, choices in (("weights", WEIGHTS), ("preemption", PREEMPTIONS)):
            if getattr(self, name) not in choices:
                raise RefoldError(f"{name}: {must_be_one_of(getattr(self, name), choices)}")
        if self.kv is not None and self.kv not in KV_POLICIES:
            raise RefoldError(f"kv: {must_be_one_of(self.kv, KV_POLICIES)}")
        for name in ("page_size", "max_rows", "chunk", "max_wait", "min_coda", "max_pending"):
            if getattr(self, name) < 1:
                raise RefoldError(f"{name}: at least 1 is required (got {getattr(self, name)})")
        for name in ("memory", "max_context", "max_queue", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RefoldError(f"{name}: at least 1 is required (got {value})")
        if self.exit_tolerance is not None and not 0 <= self.exit_tolerance < 1:
            raise RefoldError(f"exit_tolerance: must be at least 0 and below 1 (got {self.exit_tolerance})")
        if self.exit_tolerance is not None and self.exits is None:
            raise RefoldError(f"exit_tolerance: exits are required beside it (got {self.exit_tolerance:g} and none)")
        if self.chunk < self.max_rows:
            raise RefoldError(
                f"chunk: at least max_rows is required, so that every row gets its token (got {self.chunk} for "
                f"{self.max_rows} rows); raise chunk or lower max_rows"
            )
        if self.attention_workers is not None and self.kv_device is not None:
            raise RefoldError("kv_device: no attention workers are required, which hold keys and values (got both)")
        if self.drafts is not None and self.exits is not None:
            raise RefoldError("drafts: no exits are required, because drafting takes the full depth (got both)")
