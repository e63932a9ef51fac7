"""The log costs lines where it cannot be written, and never makes a caller wait."""

import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from refold.errors import RefoldError
from refold.serve.line_log import LineLog, log_to_stderr


def record(text: str, *arguments: object, error: BaseException | None = None) -> logging.LogRecord:
    found = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("refold.serve", logging.INFO, "x.py", 1, text, arguments, found)


def written(path: Path, descriptor: int, *records: logging.LogRecord) -> list[str]:
    log = LineLog(descriptor)
    for each in records:
        log.handle(each)
    log.drain()
    return path.read_text(encoding="utf-8").splitlines()


def test_each_event_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with open(path, "wb") as file:
        try:
            raise ValueError("broken\nin two")
        except ValueError as error:
            failed = record("it fails", error=error)
        lines = written(path, file.fileno(), record("a %s\n\x1b[31mred", "b"), failed, record("%d", "no number"))
    assert len(lines) == 3
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d info refold.serve: a b\\n\\x1b\[31mred", lines[0])
    assert "it fails: ValueError: broken\\nin two [" in lines[1]
    assert "test_line_log.py" in lines[1]
    assert lines[2].endswith(": %d")


def test_a_full_disk_costs_lines_and_is_told() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    log = LineLog(full)
    for number in range(5):
        log.handle(record(f"line {number}"))
    log.drain()
    reading, writing = os.pipe()
    os.dup2(writing, full)
    log.handle(record("room again"))
    log.drain()
    for each in (full, writing):
        os.close(each)
    with open(reading, encoding="utf-8") as lines:
        first, second = lines.read().splitlines()
    assert first == "(5 lines of this log are lost)"
    assert second.endswith("room again")


def test_a_pipe_that_nobody_reads_stops_nobody() -> None:
    reading, writing = os.pipe()
    log = LineLog(writing, most=50)
    done = threading.Event()

    def tell() -> None:
        for _ in range(1_000):
            log.handle(record("x" * 3_000))
        done.set()

    threading.Thread(target=tell, daemon=True).start()
    assert done.wait(30)
    begun = time.monotonic()
    log.drain(0.1)
    assert time.monotonic() - begun < 20
    os.close(reading)
    log.drain()
    os.close(writing)


def test_levels_have_names() -> None:
    with pytest.raises(RefoldError, match="log_level: "), log_to_stderr("loud"):
        pass


def test_other_logs_come_back() -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    with log_to_stderr("debug") as log:
        assert root.handlers == [log]
        assert logging.getLogger("refold.serve").isEnabledFor(logging.DEBUG)
    assert (root.handlers, root.level) == before
    log._thread.join(10)
    assert not log._thread.is_alive()


CLOSED = """
import os, sys
from refold.serve.line_log import log_to_stderr, require_standard_streams
require_standard_streams()
opened = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
assert opened > 2, opened
import logging
with log_to_stderr("info"):
    logging.getLogger("refold.serve").info("a line")
    logging.getLogger("another").info("no line")
    print("to stderr", file=sys.stderr)
assert os.fstat(opened).st_size == 0
print("fine")
"""


def test_a_closed_stderr_is_no_other_file(tmp_path: Path) -> None:
    command = f'exec "{sys.executable}" -c "$CODE" "{tmp_path / "data"}" 0<&- 2>&-'
    done = subprocess.run(["sh", "-c", command], env={**os.environ, "CODE": CLOSED}, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"fine\n")
