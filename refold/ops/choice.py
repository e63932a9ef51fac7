"""Selection of the form of a recurrence: one step, chunks, or a kernel of the device.

A graph of `torch.export` runs token by token with torch's scan operator, so that it accepts rows of any length.
"""

from collections.abc import Callable, Mapping
from types import ModuleType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from refold.ops import channel_decay, delta_rule, kernels, scalar_decay, selective_scan
from refold.ops.chunking import compute_dtype
from refold.ops.recurrence import scan, start_state

KERNELS: Mapping[ModuleType, Callable[..., tuple[Tensor, Tensor]]] = {
    scalar_decay: kernels.scalar_decay,
    channel_decay: kernels.channel_decay,
    delta_rule: kernels.delta_rule,
}


def run(
    recurrence: ModuleType,
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    *rates: Tensor | None,
    state: Float[Tensor, "B H K V"] | None,
    resets: Bool[Tensor, "B T"] | None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Runs a recurrence over tokens.

    Args:
        recurrence: `scalar_decay`, `channel_decay` or `delta_rule`.
        q: Queries, scaled.
        k: Keys.
        v: Values.
        rates: Arguments of the recurrence's `chunked` between values and state: decays, strengths.
        state: State after the previous tokens; None: zeros.
        resets: True for the first token of a document: the state is set to zero before this token; None: no document
            begins.

    Returns:
        The outputs in v's dtype, and the state after the last token in float32 (float64).
    """
    single = is_single(q, state, resets)
    is_exporting = torch.compiler.is_exporting()
    if not is_exporting and kernels.serve(q, v) and _fits(recurrence, q, single, (q, k, v, *rates, state)):
        return KERNELS[recurrence](q, k, v, *rates, state, resets, in_chunks=not single)
    if not single and is_exporting:
        return _scan(recurrence, (q, k, v, *rates), start_state(state, k, v), resets)
    if not single:
        return recurrence.chunked(q, k, v, *rates, state, resets)
    rates = tuple(rate if rate is None or rate.dim() == 1 else rate[:, 0] for rate in rates)
    out, after = recurrence.step(q[:, 0], k[:, 0], v[:, 0], *rates, state)
    return out.unsqueeze(1), after


def run_selective(
    x: Float[Tensor, "B T D"],
    dt: Float[Tensor, "B T D"],
    a: Float[Tensor, "D N"],
    b: Float[Tensor, "B T N"],
    c: Float[Tensor, "B T N"],
    state: Float[Tensor, "B D N"] | None,
    resets: Bool[Tensor, "B T"] | None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """Runs the selective scan over tokens; arguments and returns as of `selective_scan.chunked`."""
    if is_single(x, state, resets):
        out, after = selective_scan.step(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state)
        return out.unsqueeze(1), after
    if not torch.compiler.is_exporting():
        return selective_scan.chunked(x, dt, a, b, c, state, resets)
    if state is None:
        state = x.new_zeros(x.shape[0], *a.shape, dtype=compute_dtype(x))

    def step(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan.step(x, dt, a, b, c, state)

    return scan(step, (x, dt, b, c), state, resets)


def is_single(q: Tensor, state: Tensor | None, resets: Tensor | None) -> bool:
    """Returns whether a call has one token and a state to continue from."""
    return q.shape[1] == 1 and state is not None and resets is None


def _fits(recurrence: ModuleType, q: Tensor, single: bool, tensors: tuple[Tensor | None, ...]) -> bool:
    if recurrence is delta_rule and q.shape[-1] > kernels.LARGEST_DELTA_KEY:
        return False
    # Not every kernel that goes token by token can be differentiated.
    return not (single and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))


def _scan(
    recurrence: ModuleType, inputs: tuple[Tensor | None, ...], state: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Runs a recurrence token by token; an input without a token dimension is the same for all tokens."""
    is_of_tokens = [x is not None and x.dim() > 1 for x in inputs]

    def step(*token_and_state: Tensor) -> tuple[Tensor, Tensor]:
        *token, state = token_and_state
        given = iter(token)
        here = (next(given) if is_token else x for x, is_token in zip(inputs, is_of_tokens, strict=True))
        return recurrence.step(*here, state)

    return scan(step, tuple(x for x in inputs if x is not None and x.dim() > 1), state, resets)
