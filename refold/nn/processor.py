"""What this machine's processor has, and float32 products by the library that is fast on it.

torch hands float32 products on x86 to MKL, which takes two to three times as long as oneDNN on AMD processors with
AVX-512. It hands them to oneDNN where a lower precision is allowed (`torch.set_float32_matmul_precision("medium")`).
oneDNN then rounds to bfloat16 if the processor has matrix tiles (AMX), and computes in float32 if it has none.
"""

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MOST_ERROR = 2e-6
"""Relative error (Frobenius) of a product above which its numbers were rounded to less than float32."""


@contextmanager
def fast_float32(device: str | torch.device = "cpu") -> Iterator[None]:
    """Lets oneDNN compute the float32 products of the body where it is faster and as exact; elsewhere changes nothing.

    Args:
        device: Device of the products; only those of a CPU change.
    """
    before = _precision()
    if torch.device(device).type != "cpu" or before is None or not _pays():
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _precision() -> str | None:
    """Returns the precision that is set; None where somebody uses torch's newer switches, which do not mix with it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@functools.cache
def _pays() -> bool:
    is_fast = has_instructions("avx512") and not has_instructions("amx_tile")
    return is_fast and _vendor() == "AuthenticAMD" and _is_exact()


def has_instructions(name: str) -> bool:
    """Returns whether the processor has instructions that torch knows by a name, such as `amx_tile`."""
    # These functions of torch are private and missing in some versions.
    return getattr(torch.cpu, f"_is_{name}_supported", lambda: False)()


def processor_field(name: str) -> str | None:
    """Returns a field of the first processor in Linux's list, such as `model name`; None where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.lower().startswith(name)), None)


def _vendor() -> str:
    """Returns the name that the processor gives its maker; empty if it is not known."""
    # Windows has it at the end of a longer name.
    return processor_field("vendor_id") or platform.processor().rpartition(", ")[2]


def _is_exact() -> bool:
    """Returns whether a product is computed in float32 although less is allowed."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(128, 256, generator=generator) for _ in range(2))
    exact = one.double() @ other.double().T
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = one @ other.T
    finally:
        torch.set_float32_matmul_precision(before)
    return bool((found - exact).norm() <= MOST_ERROR * exact.norm())
