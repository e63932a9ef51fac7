"""Which form of a recurrence runs: a step for a token that goes on from a state, chunks, or a kernel on a device."""

from collections.abc import Callable, Mapping
from types import ModuleType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from refold.ops import channel_decay, delta_rule, kernels, scalar_decay

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
    """Takes in tokens.

    Args:
        recurrence: `scalar_decay`, `channel_decay` or `delta_rule`.
        q: Queries, scaled.
        k: Keys.
        v: Values.
        rates: What else the recurrence's `chunked` takes before the state.
        state: From the tokens before; None: zeros.
        resets: Where a document begins: the state is emptied before that token is taken in; None: nowhere.

    Returns:
        The outputs in v's dtype, and the state after the last token in float32 (float64).
    """
    single = is_single(q, state, resets)
    if kernels.serve(q, v) and _fits(recurrence, q, single, (q, k, v, *rates, state)):
        return KERNELS[recurrence](q, k, v, *rates, state, resets, in_chunks=not single)
    if not single:
        return recurrence.chunked(q, k, v, *rates, state, resets)
    rates = tuple(rate if rate is None or rate.dim() == 1 else rate[:, 0] for rate in rates)
    out, after = recurrence.step(q[:, 0], k[:, 0], v[:, 0], *rates, state)
    return out.unsqueeze(1), after


def is_single(q: Tensor, state: Tensor | None, resets: Tensor | None) -> bool:
    """Whether this call is one token that goes on from a state."""
    return q.shape[1] == 1 and state is not None and resets is None


def _fits(recurrence: ModuleType, q: Tensor, single: bool, tensors: tuple[Tensor | None, ...]) -> bool:
    if recurrence is delta_rule and q.shape[-1] > kernels.LARGEST_DELTA_KEY:
        return False
    # Not every kernel that goes token by token can be differentiated.
    return not (single and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))
