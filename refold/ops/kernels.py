"""Recurrences by the kernels of flash-linear-attention, on CUDA devices if the library is installed.

The kernels compute the same functions as our own forms; this module translates the arguments. Conventions of versions
0.5 and 0.6: layout `[B, T, H, .]` and log decays as here; queries are multiplied by `scale`, by default K^-0.5 (our
queries are scaled, so we pass 1); states are `[N, H, K, V]` in float32, not transposed, one for each of N sequences; q,
k and v have one dtype; documents of different lengths are one row with `cu_seqlens`, the start of each document and the
end of the last. With float32 inputs the kernels round factors to TF32, in half precision they also round the states
between chunks.

The library is imported only when a tensor on such a device is used, because the import fails on other machines.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from refold.errors import RefoldError

VARIABLE = "REFOLD_KERNELS"
"""Environment variable: `auto`, or `torch` to use our own forms on every device."""
DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = 0, 5
"""Oldest supported version; the functions of much older versions have the head dimension first."""
LARGEST_DELTA_KEY = 256
"""Largest key size of the delta rule's kernels."""


def serve(q: Float[Tensor, "B T G K"], v: Float[Tensor, "B T H V"]) -> bool:
    """Returns whether kernels support these tensors, are installed, and are not switched off.

    Raises:
        RefoldError: The environment variable has an invalid value.
    """
    if v.device.type not in DEVICES or v.dtype not in DTYPES or not v.numel():
        return False
    if v.dtype != torch.float32 and (q.shape[-1] % 2 or v.shape[-1] % 2):
        return False  # the kernels' backward refuses odd sizes in half precision
    return _are_wanted() and _are_installed()


def scalar_decay(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, " H"] | None,
    state: Float[Tensor, "B H K V"] | None = None,
    resets: Bool[Tensor, "B T"] | None = None,
    in_chunks: bool = True,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Computes `scalar_decay.chunked` by a kernel in chunks, or token by token without `in_chunks`."""
    repeats = v.shape[2] // q.shape[2]
    if repeats > 1:
        q, k = q.repeat_interleave(repeats, dim=2), k.repeat_interleave(repeats, dim=2)
    rates: dict[str, Tensor] = {}
    if log_decay is not None and log_decay.dim() == 1 and not log_decay.requires_grad:
        rates["g_gamma"] = log_decay  # this argument of the kernel gets no gradient
    elif log_decay is not None:
        rates["g"] = log_decay.expand(v.shape[:3])
    name = "chunk_simple_gla" if in_chunks else "fused_recurrent_simple_gla"
    return _run("simple_gla", name, q, k, v, rates, state, resets)


def channel_decay(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H K"],
    state: Float[Tensor, "B H K V"] | None = None,
    resets: Bool[Tensor, "B T"] | None = None,
    in_chunks: bool = True,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Computes `channel_decay.chunked` by a kernel in chunks, or token by token without `in_chunks`."""
    if in_chunks:
        return _run("gla", "chunk_gla", q, k, v, {"g": log_decay}, state, resets)
    return _run("gla", "fused_recurrent_gla", q, k, v, {"gk": log_decay}, state, resets)


def delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"] | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
    resets: Bool[Tensor, "B T"] | None = None,
    in_chunks: bool = True,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Computes `delta_rule.chunked` by a kernel in chunks; without `in_chunks` token by token, without gradients."""
    rates = {"beta": beta} | ({} if log_decay is None else {"g": log_decay})
    if not in_chunks:
        return _run("gated_delta_rule", "fused_recurrent_gated_delta_rule", q, k, v, rates, state, resets)
    if log_decay is None and v.dtype != torch.float32:
        return _run("delta_rule", "chunk_delta_rule", q, k, v, rates, state, resets)
    # The kernel without decays refuses float32.
    rates.setdefault("g", torch.zeros_like(beta))
    return _run("gated_delta_rule", "chunk_gated_delta_rule", q, k, v, rates, state, resets)


class _Documents(NamedTuple):
    """Holds the positions of the documents in all rows, concatenated.

    Attributes:
        bounds: Start of each document, and the end of the last one.
        first: Index of the first document of each row.
        last: Index of the last document of each row.
    """

    bounds: Int[Tensor, " N"]
    first: Int[Tensor, " B"]
    last: Int[Tensor, " B"]

    @classmethod
    def of(cls, resets: Bool[Tensor, "B T"]) -> "_Documents":
        starts = resets.clone()
        starts[:, 0] = True
        ends = starts.sum(dim=1).cumsum(dim=0)
        places = starts.flatten().nonzero().squeeze(1)
        bounds = torch.cat([places, places.new_tensor([starts.numel()])])
        return cls(bounds, ends - starts.sum(dim=1), ends - 1)


_documents: "WeakIdKeyDictionary" = WeakIdKeyDictionary()
"""Documents by `resets`, which all depths of a pass share; they are cached because `nonzero` waits for the device."""


def _run(
    module: str,
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: dict[str, Tensor],
    state: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    kernel = _find(module, name)
    inputs = {"q": q.to(v.dtype), "k": k.to(v.dtype), "v": v} | {name: rate.float() for name, rate in rates.items()}
    start = None if state is None else state.float()
    options: dict[str, Any] = {"scale": 1.0, "output_final_state": True}
    with torch.autocast(v.device.type, enabled=False):
        if resets is None:
            return kernel(**inputs, initial_state=start, **options)
        if resets not in _documents:
            _documents[resets] = _Documents.of(resets)
        documents: _Documents = _documents[resets]
        rows = {name: x if x.dim() == 1 else x.flatten(0, 1).unsqueeze(0) for name, x in inputs.items()}
        if start is not None:
            start = start.masked_fill(resets[:, 0, None, None, None], 0.0)
            empty = start.new_zeros(len(documents.bounds) - 1, *start.shape[1:])
            start = empty.index_copy(0, documents.first, start)
        out, states = kernel(**rows, initial_state=start, cu_seqlens=documents.bounds, **options)
        return out.view(v.shape), states[documents.last]


def _are_wanted() -> bool:
    wish = os.environ.get(VARIABLE, "auto")
    if wish not in ("auto", "torch"):
        raise RefoldError(f"{VARIABLE}: auto or torch is required (got {wish}); set one of them, or unset it")
    return wish == "auto"


@functools.cache
def _are_installed() -> bool:
    """Returns whether the library is installed, without importing it."""
    return importlib.util.find_spec("fla") is not None


@functools.cache
def _find(module: str, name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    mend = f"install refold's extra `gpu` anew, or set {VARIABLE}=torch to do without"
    try:
        version = importlib.import_module("fla").__version__
        if tuple(int(number) for number in version.split(".")[:2]) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise RefoldError(f"kernels: flash-linear-attention {oldest} or newer is required (got {version}); {mend}")
        return getattr(importlib.import_module(f"fla.ops.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise RefoldError(
            f"kernels: an installation of flash-linear-attention with {name} is required (got {error}); {mend}"
        ) from error
