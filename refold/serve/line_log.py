"""The log of a server: one line on stderr for each event, which never makes anyone wait."""

import contextlib
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator

from refold.errors import RefoldError
from refold.suggest import must_be_one_of

LEVELS = ("debug", "info", "warning", "error")
MOST_LINES = 10_000
"""Lines that wait to be written; further ones are dropped and counted."""
MOST_CHARACTERS = 4_000
_STDERR = 2


class LineLog(logging.Handler):
    """Writes records to a file descriptor from a thread of its own.

    A full disk, a pipe that nobody reads and a closed descriptor cost lines of the log and nothing else.

    Args:
        descriptor: Where lines go.
        most: Most lines that wait.
    """

    def __init__(self, descriptor: int = _STDERR, most: int = MOST_LINES):
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[bytes | None] = queue.Queue(most)
        self._num_lost = 0
        self._thread = threading.Thread(target=self._write, name="refold-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(_as_line(record).encode(errors="backslashreplace"))
        except queue.Full:
            self._num_lost += 1

    def drain(self, seconds: float = 1.0) -> None:
        """Waits until all lines are written, or for a time."""
        deadline = time.monotonic() + seconds
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)

    def close(self) -> None:
        """Writes what waits, for a second at most, and lets the thread end."""
        self.drain()
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._num_lost and self._put(f"({self._num_lost} lines of this log are lost)\n".encode()):
                self._num_lost = 0
            if not self._put(line):
                self._num_lost += 1
            self._lines.task_done()
        self._lines.task_done()

    def _put(self, line: bytes) -> bool:
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError:
            return False
        return True


@contextlib.contextmanager
def log_to_stderr(level: str) -> Iterator[LineLog]:
    """Sends all loggers of this process to one `LineLog` while the body runs.

    Args:
        level: Least level of refold's own lines; those of other packages are warnings at least.

    Raises:
        RefoldError: There is no such level.
    """
    if level not in LEVELS:
        raise RefoldError(f"log_level: {must_be_one_of(level, LEVELS)}")
    log, root, own = LineLog(), logging.getLogger(), logging.getLogger("refold")
    before = root.handlers[:], root.level, own.level
    root.handlers[:] = [log]
    root.setLevel(logging.WARNING)
    own.setLevel(level.upper())
    logging.captureWarnings(True)
    try:
        yield log
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        own.setLevel(before[2])
        log.close()


def require_standard_streams() -> None:
    """Opens standard streams that are closed, so that no other file gets their numbers, and with them lines meant for
    a terminal."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is given.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _as_line(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except (TypeError, ValueError):
        text = str(record.msg)
    if record.exc_info and record.exc_info[1] is not None:
        text += f": {fold_error(record.exc_info[1])}"
    text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text[:MOST_CHARACTERS].strip())
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
    return f"{when} {record.levelname.lower()} {record.name}: {text}\n"


def fold_error(error: BaseException) -> str:
    """Returns an exception with the places it went through in one line, the innermost first."""
    places = [f"{each.filename}:{each.lineno} {each.name}" for each in traceback.extract_tb(error.__traceback__)]
    return f"{type(error).__name__}: {error} [{' < '.join(reversed(places[-12:]))}]"
