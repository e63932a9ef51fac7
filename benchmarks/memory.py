"""Anonymous memory of a process: its memory without mapped files, whose pages the kernel can drop."""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.002
"""Seconds between two samples; a matrix of tens of megabytes exists for longer."""


@dataclass(frozen=True)
class ProcessRun:
    """A finished process.

    Attributes:
        peak: Largest sampled anonymous resident memory in bytes (`RssAnon` of /proc/PID/status).
        seconds: Wall time, imports included.
        looks: Number of samples.
        output: Text on stdout.
    """

    peak: int
    seconds: float
    looks: int
    output: str


def anonymous_bytes(pid: int | str = "self") -> int:
    """Returns the anonymous resident memory of a process, or 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def run_python(arguments: Sequence[str]) -> ProcessRun:
    """Runs this interpreter and samples its anonymous memory from outside.

    Raises:
        RuntimeError: There is no /proc/PID/status with RssAnon (Linux 4.5), or the process failed.
    """
    if not anonymous_bytes():
        raise RuntimeError("memory: /proc/self/status with RssAnon is required (Linux 4.5 or later)")
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    peak = looks = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        looks += 1
        time.sleep(INTERVAL)
    seconds = time.perf_counter() - begun
    output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise RuntimeError(f"memory: python {' '.join(arguments)[:200]} failed with {process.returncode}")
    return ProcessRun(peak, seconds, looks, output)
