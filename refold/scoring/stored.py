"""Stored next-token distributions of a teacher: the likeliest tokens, and one bucket for all others."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from refold.errors import HealError
from refold.scoring.head import CHUNK_BYTES, Predictions, chunks

_SMALLEST_LOG_TAIL = -60.0  # lower bound of a student's log tail; e^-60 is well within float32


class StoredPredictions(NamedTuple):
    """Top-k distribution of each position: k + 1 buckets whose probabilities add up to 1, up to rounding.

    Attributes:
        ids: The k likeliest tokens.
        log_probabilities: Log-probabilities of these tokens.
        log_tail: Log of the probability of all other tokens together; minus infinity if there are no others.
    """

    ids: Int64[Tensor, "*M k"]
    log_probabilities: Float[Tensor, "*M k"]
    log_tail: Float[Tensor, "*M"]

    def flat(self, index: Int64[Tensor, "K"] | None) -> "StoredPredictions":
        """Returns the positions of a flat index, or all positions, as `[K, k]`."""
        parts = self.ids.flatten(0, -2), self.log_probabilities.flatten(0, -2), self.log_tail.flatten()
        return StoredPredictions(*(part if index is None else part.index_select(0, index) for part in parts))


@torch.no_grad()
def likeliest(predictions: Predictions, k: int, chunk_bytes: int = CHUNK_BYTES) -> StoredPredictions:
    """Returns the top-k distribution of every position, in float32 (float64 for a float64 head).

    Args:
        predictions: Hidden states `[*M, D]` and head.
        k: Number of tokens, at most the size of the vocabulary.
        chunk_bytes: Size of the logits in memory at a time.

    Raises:
        HealError: The vocabulary has fewer than k tokens.
    """
    vocab_size = predictions.head.vocab_size
    if not 1 <= k <= vocab_size:
        raise HealError(f"top_k: 1 to the vocabulary's {vocab_size} tokens are required (got {k}); take fewer")
    shape = predictions.hidden.shape[:-1]
    hidden, head = predictions.flat(None)
    rows = []
    for chunk in chunks(len(hidden), vocab_size, 1, chunk_bytes):
        log_p = head.logits(hidden[chunk]).log_softmax(-1)
        top, ids = log_p.topk(k)
        rows.append((ids, top, _log_tail(log_p, ids)))
    ids, top, tail = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return StoredPredictions(ids.reshape(*shape, k), top.reshape(*shape, k), tail.reshape(shape))


def stored_forward_kl(
    student: Float[Tensor, "M N"], teacher: StoredPredictions
) -> tuple[Float[Tensor, "M"], Float[Tensor, "M N"]]:
    """Returns `KL(p || q)` over k + 1 buckets, and its gradient with respect to the student's logits.

    With t the bucket of all other tokens, the gradient is `q_i - p_i` for the k tokens and `q_j (1 - p_t / q_t)` for
    each other token. If k is the size of the vocabulary, this equals `forward_kl`. Stored numbers are rounded, so they
    are normalised first.

    Args:
        student: Log-probabilities, which stay unchanged.
        teacher: Stored predictions of the same positions.
    """
    ids, log_p, log_pt = teacher.ids, teacher.log_probabilities.to(student.dtype), teacher.log_tail.to(student.dtype)
    total = torch.logaddexp(log_p.logsumexp(-1), log_pt)
    log_p, log_pt = log_p - total[:, None], log_pt - total
    p, pt = log_p.exp(), log_pt.exp()
    log_q = student.gather(1, ids)
    log_qt = _log_tail(student, ids)
    has_tail = pt > 0
    value = (p * (log_p - log_q)).sum(-1)
    value += torch.where(has_tail, pt * (log_pt - log_qt), 0)
    ratio = torch.where(has_tail, (log_pt - log_qt.clamp_min(_SMALLEST_LOG_TAIL)).exp(), 0)
    slope = student.exp().mul_((1 - ratio)[:, None])
    return value, slope.scatter_(1, ids, log_q.exp().sub_(p))


def _log_tail(log_probabilities: Tensor, ids: Tensor) -> Tensor:
    """Returns the log of the sum of all other probabilities; 1 minus the sum of these would lose small values."""
    return log_probabilities.scatter(1, ids, -torch.inf).logsumexp(-1)
