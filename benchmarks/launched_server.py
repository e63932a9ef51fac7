"""A server as a user starts it: `refold serve` in a process of its own, and the vitals of its processes."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from contest import TICKS

READY_SECONDS = 180.0
SERVE = (sys.executable, "-m", "refold", "serve")
ENGINE = b"refold.serve.engine_process"


@dataclass(frozen=True)
class Vitals:
    """Memory, files and threads of one process, as the system counts them.

    Attributes:
        resident: Bytes of resident memory.
        files: Open files.
        threads: Threads.
        cpu_seconds: CPU time so far.
    """

    resident: int
    files: int
    threads: int
    cpu_seconds: float

    @classmethod
    def of(cls, pid: int) -> "Vitals":
        """Reads them."""
        folder = Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        return cls(
            resident=int(status["VmRSS"].split()[0]) * 1024,
            files=len(os.listdir(folder / "fd")),
            threads=int(status["Threads"]),
            cpu_seconds=(int(fields[11]) + int(fields[12])) / TICKS,
        )


class LaunchedServer:
    """A server that runs as long as the context.

    Args:
        arguments: Of `refold serve`, without the port.
        log: File for its stderr.
        environment: Further variables.

    Attributes:
        line: The line it says when it is ready.
        seconds: Time from its start to this line.
        address: Host and port.
        pids: Ids of its processes, `http` and `engine`.
    """

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None):
        self._command = [*SERVE, *arguments, "--port", "0"]
        self._log, self._environment = log, {**os.environ, **(environment or {})}
        self.line, self.seconds, self.pids = "", 0.0, dict[str, int]()
        self.address = ("127.0.0.1", 0)

    def __enter__(self) -> "LaunchedServer":
        begun = time.perf_counter()
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, text=True, env=self._environment
            )
        try:
            self.line = self._first_line()
            self.seconds = time.perf_counter() - begun
            self.address = ("127.0.0.1", int(self.line.split()[0].rpartition(":")[2]))
            self.pids = {"http": self.process.pid, "engine": _engine_of(self.process.pid)}
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def stderr(self) -> str:
        """The text of its log."""
        return self._log.read_text()

    def vitals(self) -> dict[str, Vitals]:
        """Reads the vitals of both processes."""
        return {name: Vitals.of(pid) for name, pid in self.pids.items()}

    def terminate(self, seconds: float = 60.0) -> tuple[float, int]:
        """Sends SIGTERM, and returns the time to the end and the exit status."""
        begun = time.perf_counter()
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(seconds)
        return time.perf_counter() - begun, status

    def _first_line(self) -> str:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], READY_SECONDS)[0]:
            raise TimeoutError(f"a server that is ready within {READY_SECONDS:g} s is required: {self.stderr[-2000:]}")
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"a server that starts is required: {self.stderr[-2000:]}")
        return line

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def _engine_of(pid: int) -> int:
    """Returns the id of the engine's process of a server."""
    children = " ".join(each.read_text() for each in Path(f"/proc/{pid}/task").glob("*/children")).split()
    for child in children:
        if ENGINE in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise RuntimeError(f"a server with an engine's process is required (its children are {children})")
