"""How far a run is: a bar where stderr is a terminal, else a plain line now and then."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from refold.healing.log import StepRecord

_SECONDS_BETWEEN_LINES = 10.0


class Display:
    """Shows step records on stderr while the `with` body runs.

    Args:
        tokens: training tokens of the whole run.
        quiet: shows nothing but `tell`'s lines.
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
        """Says how many tokens an earlier run has seen already."""
        self._first = tokens
        self._start = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=tokens)

    def show(self, record: StepRecord) -> None:
        """Shows where the run stands after a step."""
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
        """Prints a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(f"heal: {line}", file=sys.stderr, flush=True)
