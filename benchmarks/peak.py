"""Peak memory of work inside this process."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MMAP_THRESHOLD_OPTION, MMAP_THRESHOLD = -3, 128 * 1024
"""glibc's mallopt: larger pieces are mapped one by one, and go back to the kernel when they are freed."""


def peak_bytes(run: Callable[[], object]) -> int:
    """Returns the rise of peak resident memory above its value before.

    The kernel records the peak, so short-lived memory counts too. After the first call this process maps each larger
    allocation separately, which costs time. So measure times before.

    Raises:
        RuntimeError: This is no Linux with glibc, or its kernel does not let the highest value be reset.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(MMAP_THRESHOLD_OPTION, MMAP_THRESHOLD)
        gc.collect()
        libc.malloc_trim(0)
        CLEAR_REFS.write_text("5")
    except OSError as error:
        raise RuntimeError("peak: Linux with glibc and /proc/self/clear_refs is required") from error
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"peak: /proc/self/status with {name} is required")
