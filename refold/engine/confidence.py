"""Measures of how sure an early exit is of its token."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from refold.errors import RefoldError
from refold.suggest import must_be_one_of

Measure = Literal["top1", "margin", "entropy", "gate", "agreement"]
"""Names of the measures; `confidence` has their formulas."""


def confidence(
    measure: str, outputs: Float[Tensor, "*outputs"], previous: Int64[Tensor, "*R"] | None
) -> Float[Tensor, "*R"]:
    """Returns the confidence of an exit in its likeliest token, between 0 and 1; a token leaves from a threshold on.

    With p the softmax of the logits z of N tokens, and p1 and p2 its two largest values (CALM, arXiv 2207.07061,
    section 3.5, for the first two):

        top1        p1
        margin      p1 - p2
        entropy     1 + sum p log p / log N
        gate        sigmoid(g), g the output of the exit's gate
        agreement   1 if the likeliest token is that of the exit before, else 0; at the first exit 0

    Args:
        measure: One of `MEASURES`.
        outputs: Logits of the exit `[*R, N]`; for `gate`, the gate's outputs `[*R]`, so that rows that stay need no
            head.
        previous: For `agreement`, the likeliest token at the exit before; -1 where there was none. None: no exit
            before.

    Returns:
        Float32, or float64 for float64 outputs.

    Raises:
        RefoldError: There is no such measure.
    """
    if measure not in _FORMULAS:
        raise RefoldError(f"measure: {must_be_one_of(measure, _FORMULAS)}")
    wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    return _FORMULAS[measure](wide, previous)


def reads_gate(measure: str) -> bool:
    """Says whether a measure reads the gate instead of logits."""
    return measure == "gate"


def compares_exits(measure: str) -> bool:
    """Says whether a measure compares an exit with the exit before, where the token stays then."""
    return measure == "agreement"


def _top1(logits: Tensor, _: Tensor | None) -> Tensor:
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def _margin(logits: Tensor, _: Tensor | None) -> Tensor:
    best = (logits.topk(2, -1).values - logits.logsumexp(-1, keepdim=True)).exp()
    return best[..., 0] - best[..., 1]


def _entropy(logits: Tensor, _: Tensor | None) -> Tensor:
    log_p = logits.log_softmax(-1)
    # A token with probability 0 has a logit of minus infinity, and 0 log 0 = 0.
    terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p)
    return (1 + terms.sum(-1) / math.log(logits.shape[-1])).clamp(0, 1)


def _gate(outputs: Tensor, _: Tensor | None) -> Tensor:
    return outputs.sigmoid()


def _agreement(logits: Tensor, previous: Tensor | None) -> Tensor:
    if previous is None:
        return logits.new_zeros(logits.shape[:-1])
    return (logits.argmax(-1) == previous).to(logits.dtype)


_FORMULAS: Mapping[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "top1": _top1,
    "margin": _margin,
    "entropy": _entropy,
    "gate": _gate,
    "agreement": _agreement,
}
MEASURES = tuple(_FORMULAS)
"""Names of all measures."""
