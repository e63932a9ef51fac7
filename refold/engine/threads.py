"""The threads of torch: how many an engine takes, and whether they wait ready or asleep between two products."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from refold.errors import RefoldError

logger = logging.getLogger("refold")


@dataclass(frozen=True)
class Threads:
    """The threads that run products.

    Attributes:
        num_threads: Of torch, for one product.
        num_cpus: That this process may use.
        wait_policy: The value of `OMP_WAIT_POLICY` when torch was loaded. Empty: libgomp's default, by which a thread
            waits ready for some milliseconds and then sleeps, so that it is awake between the products of a step and
            idle between requests. `PASSIVE`: it sleeps at once, and every product wakes it.
    """

    num_threads: int
    num_cpus: int
    wait_policy: str

    @property
    def sleeps_between_products(self) -> bool:
        """Whether threads sleep at once, which makes products of one row about 1.8 times as long."""
        return self.num_threads > 1 and self.wait_policy.upper() == "PASSIVE"


def set_threads(num_threads: int | None = None) -> Threads:
    """Sets the number of torch's threads, and logs a line where they will be slow.

    Args:
        num_threads: How many; None: the number that torch has, and at most as many as there are CPUs.

    Raises:
        RefoldError: Fewer than one.
    """
    if num_threads is not None and num_threads < 1:
        raise RefoldError(f"threads: at least 1 is required (got {num_threads}); leave it out for one per CPU")
    cpus = count_cpus()
    # Setting the number that is set already would still make the threads anew.
    wanted = min(torch.get_num_threads(), cpus) if num_threads is None else num_threads
    if wanted != torch.get_num_threads():
        torch.set_num_threads(wanted)
    threads = Threads(wanted, cpus, os.environ.get("OMP_WAIT_POLICY", ""))
    if wanted > cpus:
        logger.warning(f"threads: {wanted} threads share {cpus} CPUs, and each product waits for the last of them")
    if threads.sleeps_between_products:
        logger.info(
            "threads: OMP_WAIT_POLICY=PASSIVE lets threads sleep between products; unset it where no other process "
            "needs these CPUs: decoding few rows is then up to 1.8 times as fast"
        )
    return threads


def count_cpus(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Returns the number of CPUs that this process may use, by its affinity and its container's quota.

    Args:
        quota: The file in which Linux gives the quota: microseconds of all CPUs in a period, or `max`, and the period.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        allowed, period = quota.read_text(encoding="utf-8").split()
        return cpus if allowed == "max" else max(1, min(cpus, int(allowed) // int(period)))
    except (OSError, ValueError):
        return cpus
