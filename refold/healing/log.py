"""`train.jsonl`: one line for each optimizer step."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from refold.checkpoint.atomic_file import write_text

LOG_NAME = "train.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did.

    Attributes:
        step: counted from 1, over all stages.
        tokens: training tokens seen so far, over all stages.
        loss: mean over the batch, weighted as the stage says.
        objectives: its parts, unweighted: `cross_entropy`, `forward_kl`.
        learning_rate: of this step.
        grad_norm: 2-norm of all gradients before clipping.
        tokens_per_second: of this step.
        skipped: whether loss or gradient were not finite, so that no weight changed.
        stage: counted from 1.
        frozen: whether weights wait to be thawed; None where the stage thaws none.
        held_out: bits per byte of the held-out text after the step; None where it was not measured.
    """

    step: int
    tokens: int
    loss: float
    objectives: Mapping[str, float]
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    skipped: bool = False
    stage: int = 1
    frozen: bool | None = None
    held_out: float | None = None

    def as_line(self) -> str:
        """Returns the JSON line; numbers that are not finite, which JSON does not know, become null."""
        values: dict[str, Any] = asdict(self)
        for name in ("frozen", "held_out"):
            if values[name] is None:
                del values[name]
        values |= values.pop("objectives")
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        return json.dumps(plain) + "\n"


class TrainLog:
    """Appends step records to a file; a resumed run first cuts off what its checkpoint does not know.

    Args:
        path: the file.
        after_step: lines of later steps are dropped, a torn last line too.
    """

    def __init__(self, path: Path, after_step: int):
        self.path = path
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= after_step]
        write_text(path, "".join(kept))
        self._file = path.open("a")

    def __enter__(self) -> "TrainLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, record: StepRecord) -> None:
        """Appends one record; a kill of the process loses none that was written."""
        self._file.write(record.as_line())
        self._file.flush()

    def sync(self) -> None:
        """Flushes all records to disk."""
        os.fsync(self._file.fileno())


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log as plain data."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
