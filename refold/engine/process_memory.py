"""The memory of this process and of its device: at present, and at its peak."""

import ctypes
import gc
import platform
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak(device: torch.device) -> int | None:
    """Sets the peak of the memory to its present value and returns it in bytes; None where the system has no peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if device.type != "cpu" or platform.system() != "Linux":
        return None
    try:
        # Memory that is free inside this process would hide the need of the next model.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        CLEAR_REFS.write_text("5")
    except (OSError, AttributeError):
        return None
    return _resident("VmRSS")


def read_peak(device: torch.device) -> int | None:
    """Returns the peak since `forget_peak` in bytes; None where the system has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM") if device.type == "cpu" and platform.system() == "Linux" else None


def resident_bytes() -> int:
    """Returns the resident bytes of this process; 0 where the system does not tell."""
    return (_resident("VmRSS") or 0) if platform.system() == "Linux" else 0


def _resident(name: str) -> int | None:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
