"""Records of training steps: the log file, the display in the terminal, and trackers."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate.tracking import filter_trackers, get_available_trackers
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from refold.checkpoint.atomic_file import write_text
from refold.errors import HealError
from refold.healing.team import Team
from refold.suggest import did_you_mean

LOG_NAME = "train.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """Holds the figures of one optimizer step.

    Attributes:
        step: counted from 1, over all stages.
        tokens: training tokens seen so far, over all stages.
        loss: mean over the batch, with the weights of the stage's objectives.
        objectives: the unweighted parts of the loss: `cross_entropy`, `forward_kl`.
        learning_rate: of this step.
        grad_norm: 2-norm of all gradients before clipping.
        tokens_per_second: of this step.
        skipped: whether loss or gradient were not finite, so that no weight changed.
        stage: counted from 1.
        frozen: whether weights are still frozen; None if the stage thaws no weights.
        held_out: bits per byte of the held-out text after the step; None if it was not measured.
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
        """Returns the JSON line; numbers that are not finite become null, because JSON cannot express them."""
        values: dict[str, Any] = asdict(self)
        for name in ("frozen", "held_out"):
            if values[name] is None:
                del values[name]
        values |= values.pop("objectives")
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        return json.dumps(plain) + "\n"


class TrainLog:
    """Appends step records to a file; a resumed run first removes the records after its checkpoint.

    Args:
        path: the file.
        after_step: records of later steps are removed, and an incomplete last line too.
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
        """Appends one record; written records survive a kill of the process."""
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


_SECONDS_BETWEEN_LINES = 10.0


class Display:
    """Shows step records on stderr while the `with` body runs.

    Args:
        tokens: training tokens of the whole run.
        quiet: shows only the lines of `tell`.
    """

    def __init__(self, tokens: int, quiet: bool = False):
        self._tokens, self._first, self._quiet = tokens, 0, quiet
        self._start = self._last_line = time.monotonic()
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal and not quiet:
            columns = (
                TextColumn("heal"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("heal", total=tokens, facts="")

    def __enter__(self) -> "Display":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start_at(self, tokens: int) -> None:
        """Sets the number of tokens that were trained before a resume."""
        self._first = tokens
        self._start = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=tokens)

    def show(self, record: StepRecord) -> None:
        """Shows the progress of the run after a step."""
        now = time.monotonic()
        speed = (record.tokens - self._first) / max(now - self._start, 1e-9)
        facts = f"loss {record.loss:.3f}  {speed:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=record.tokens, facts=facts)
        elif not self._quiet and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (self._tokens - record.tokens) / max(speed, 1e-9)
            self.tell(f"{record.tokens:,} of {self._tokens:,} tokens  {facts}  {left:,.0f} s left")

    def tell(self, line: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(f"heal: {line}", file=sys.stderr, flush=True)


KNOWN = ("tensorboard", "wandb", "trackio")


def require_trackers(names: Sequence[str]) -> None:
    """Checks names of trackers.

    Raises:
        HealError: a tracker is unknown or not installed.
    """
    for name in names:
        if name not in KNOWN:
            raise HealError(
                f"report_to: one of {', '.join(KNOWN)} is required (got '{name}'){did_you_mean(name, KNOWN)}"
            )
        if name not in {str(known) for known in get_available_trackers()}:
            raise HealError(f"report_to: {name} is required (not installed); pip install {name}")


class Trackers:
    """Sends step records to the trackers of a run, from its first process.

    Args:
        names: names of trackers; empty: no record is sent.
        project: the run's destination folder; its name becomes the name of the run.
        config: settings of the run, as plain data.
        team: the processes of the run.

    Raises:
        HealError: a tracker is unknown or not installed.
    """

    def __init__(self, names: Sequence[str], project: Path, config: dict[str, Any], team: Team):
        self._accelerator: Any = None
        require_trackers(names)
        if names:
            folder = project.parent / "trackers"
            self._accelerator = team.accelerator
            self._accelerator.project_configuration.set_directories(str(folder))
            self._accelerator.log_with = filter_trackers(list(names), folder)
            self._accelerator.init_trackers(project.name, config)

    def send(self, record: StepRecord) -> None:
        """Sends the record of one step."""
        if self._accelerator is None:
            return
        values: dict[str, Any] = {"loss": record.loss, **record.objectives}
        values |= {"learning_rate": record.learning_rate, "grad_norm": record.grad_norm, "tokens": record.tokens}
        if record.held_out is not None:
            values["held_out_bits_per_byte"] = record.held_out
        self._accelerator.log(values, step=record.step)

    def close(self) -> None:
        """Ends the run in all trackers."""
        if self._accelerator is not None:
            self._accelerator.end_training()
            self._accelerator = None
