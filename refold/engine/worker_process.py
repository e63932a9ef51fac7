"""Attention workers on this host, started by an engine and ended with it."""

import os
import selectors
import subprocess
import sys
import time

from refold.errors import RefoldError

STARTING = 120.0
"""Seconds within which a worker must listen."""
ENDING = 5.0
"""Seconds that a worker has to end by itself."""


class WorkerProcesses:
    """Worker processes of this host. They end when they are closed, and when this process ends, in whatever way.

    Args:
        count: How many.
        threads: CPU threads of each; None: equal shares of the processors, one of which stays with the model.
        once: Whether they end after their first engine.

    Raises:
        RefoldError: One of them does not start.
    """

    def __init__(self, count: int, threads: int | None = None, once: bool = True):
        threads = threads or max(1, (os.cpu_count() or 1) // (count + 1))
        # Threads that spin while they wait would take the model's processors.
        env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "refold", "worker", "--address", "127.0.0.1:0", "--owned"]
        command += ["--once"] if once else []
        self._processes = [
            # Their standard input is a pipe that the system closes when this process ends.
            subprocess.Popen(
                [*command, "--threads", str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
            )
            for _ in range(count)
        ]
        try:
            deadline = time.monotonic() + STARTING
            self.addresses = tuple(_read_address(each, deadline) for each in self._processes)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids."""
        return tuple(each.pid for each in self._processes)

    def close(self) -> None:
        """Ends all of them."""
        for each in self._processes:
            for pipe in (each.stdin, each.stdout):
                if pipe is not None:
                    pipe.close()
        deadline = time.monotonic() + ENDING
        for each in self._processes:
            try:
                each.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                each.kill()
                each.wait()


def _read_address(process: "subprocess.Popen[bytes]", deadline: float) -> str:
    """Returns the address that a worker prints when it listens."""
    pipe, told = process.stdout, b""
    assert pipe is not None
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while not told.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise RefoldError(f"attention_workers: an answer within {STARTING:.0f} s is required (got none)")
            read = os.read(pipe.fileno(), 256)
            if not read:
                raise RefoldError(
                    f"attention_workers: a worker that starts is required (got exit status {process.wait()}); its "
                    f"messages stand above"
                )
            told += read
    return told.decode().strip()
