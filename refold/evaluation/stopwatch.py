"""Seconds by kind of work, waiting for the device where it works ahead."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up wall-clock seconds under names.

    Attributes:
        seconds: By name.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Counts the body's seconds; with a CUDA or MPS device until it has finished its work."""
        start = time.perf_counter()
        try:
            yield
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            elif device is not None and device.type == "mps":
                torch.mps.synchronize()
        finally:
            self.seconds[name] += time.perf_counter() - start
