"""Scores of a model on text, and its agreement with a reference model, computed without holding all logits."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from refold.errors import DataError
from refold.scoring.divergences import forward_kl
from refold.scoring.head import CHUNK_BYTES, Predictions, check_same_vocabulary, chunks, scored_positions


class TokenScores(NamedTuple):
    """Scores of every position; 0 and False at positions with the label -100.

    Attributes:
        nll: Negative log-likelihood of the label, nats.
        is_correct: Whether the likeliest token is the label.
        agrees: Whether model and reference have the same likeliest token; None without a reference.
        kl: `KL(reference || model)`, nats; None without a reference.
        reference: Scores of the reference; None without a reference.
    """

    nll: Float[Tensor, "*M"]
    is_correct: Bool[Tensor, "*M"]
    agrees: Bool[Tensor, "*M"] | None = None
    kl: Float[Tensor, "*M"] | None = None
    reference: "TokenScores | None" = None


@dataclass(frozen=True)
class Scores:
    """Sums of scores over tokens; add several with `sum(scores, Scores())`.

    Attributes:
        nll: Negative log-likelihood in nats, summed in float64.
        num_tokens: Number of scored tokens.
        num_correct: Number of scored tokens that are the model's likeliest token.
        num_compared: Number of scored tokens with a reference.
        num_agreeing: Number of compared tokens for which model and reference have the same likeliest token.
        kl: KL in nats of the compared tokens, summed in float64.
    """

    nll: float = 0.0
    num_tokens: int = 0
    num_correct: int = 0
    num_compared: int = 0
    num_agreeing: int = 0
    kl: float = 0.0

    def __add__(self, other: "Scores") -> "Scores":
        return Scores(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def perplexity(self) -> float:
        """Perplexity per scored token, by the function `perplexity`."""
        return perplexity(self.nll, self.num_tokens)

    @property
    def accuracy(self) -> float:
        """Share of scored tokens that are the model's likeliest token."""
        return _ratio(self.num_correct, self.num_tokens, "scored token")

    @property
    def agreement(self) -> float:
        """Share of compared tokens for which model and reference have the same likeliest token."""
        return _ratio(self.num_agreeing, self.num_compared, "token compared with a reference")

    @property
    def mean_kl(self) -> float:
        """`KL(reference || model)`, nats per compared token."""
        return _ratio(self.kl, self.num_compared, "token compared with a reference")

    def bits_per_byte(self, num_bytes: int) -> float:
        """Returns the bits per byte by the function `bits_per_byte`."""
        return bits_per_byte(self.nll, num_bytes)


@torch.no_grad()
def token_scores(
    model: Predictions,
    labels: Int64[Tensor, "*M"],
    *,
    reference: Predictions | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenScores:
    """Returns the scores of every position.

    Args:
        model: Hidden states `[*M, D]` and head.
        labels: The id that each position predicts (already shifted); -100: not scored.
        reference: Hidden states of the same positions and head of the reference model.
        chunk_bytes: Size of the float32 logits in memory at a time.

    Raises:
        SourceError: The vocabularies differ.
    """
    if reference is not None:
        check_same_vocabulary(model.head, reference.head)
    index = scored_positions(labels)
    kept = labels.reshape(-1) if index is None else labels.reshape(-1).index_select(0, index)
    scored = _score(model.flat(index), kept, None if reference is None else reference.flat(index), chunk_bytes)
    own, compared, theirs = (_Pair(*(_spread(column, index, labels) for column in pair)) for pair in scored)
    if reference is None:
        return TokenScores(*own)
    return TokenScores(*own, *compared, TokenScores(*theirs))


@torch.no_grad()
def likeliest_tokens(
    model: Predictions, labels: Int64[Tensor, "*M"], *, chunk_bytes: int = CHUNK_BYTES
) -> Int64[Tensor, "*M"]:
    """Returns the likeliest token at every position whose label is not -100, and -100 elsewhere.

    Args:
        model: Hidden states `[*M, D]` and head.
        labels: Labels; -100: the position is skipped.
        chunk_bytes: Size of the float32 logits in memory at a time.
    """
    index = scored_positions(labels)
    flat = model.flat(index)
    best = torch.empty(len(flat.hidden), dtype=torch.int64, device=labels.device)
    for rows in chunks(len(best), model.head.vocab_size, 1, chunk_bytes):
        best[rows] = model.head.logits(flat.hidden[rows]).argmax(-1)
    if index is None:
        return best.reshape(labels.shape)
    return torch.full_like(labels.reshape(-1), -100).index_copy_(0, index, best).reshape(labels.shape)


def score(
    model: Predictions,
    labels: Int64[Tensor, "*M"],
    *,
    reference: Predictions | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Scores:
    """Returns the sums of `token_scores` over all scored positions, with its arguments and errors."""
    scores = token_scores(model, labels, reference=reference, chunk_bytes=chunk_bytes)
    num_tokens = int((labels != -100).sum())
    return Scores(
        # Summed on the CPU, because not every device has float64.
        nll=float(scores.nll.cpu().double().sum()),
        num_tokens=num_tokens,
        num_correct=int(scores.is_correct.sum()),
        num_compared=0 if scores.agrees is None else num_tokens,
        num_agreeing=0 if scores.agrees is None else int(scores.agrees.sum()),
        kl=0.0 if scores.kl is None else float(scores.kl.cpu().double().sum()),
    )


def bits_per_byte(nll: float, num_bytes: int) -> float:
    """Returns `nll / log 2 / num_bytes`, the bits per UTF-8 byte of text, which does not depend on the tokenizer.

    Args:
        nll: Sum over the tokens of the text, nats.
        num_bytes: UTF-8 bytes of the text.

    Raises:
        DataError: `num_bytes` is 0.
    """
    return _ratio(nll / math.log(2), num_bytes, "byte of text")


def perplexity(nll: float, num_tokens: int) -> float:
    """Returns `exp(nll / num_tokens)`, or infinity if the result is too large for a float.

    Raises:
        DataError: `num_tokens` is 0.
    """
    mean = _ratio(nll, num_tokens, "scored token")
    return math.exp(mean) if mean < 709 else math.inf


class _Pair(NamedTuple):
    """Two columns with one row per position."""

    first: Tensor
    second: Tensor


def _score(
    model: Predictions, labels: Tensor, reference: Predictions | None, chunk_bytes: int
) -> tuple[_Pair, _Pair, _Pair]:
    """Returns likelihood and correctness of the model, agreement and KL, and the first two for the reference."""
    dtype = torch.promote_types(model.head.weight.dtype, torch.float32)
    count, device = len(labels), labels.device

    def columns(first: torch.dtype, second: torch.dtype) -> _Pair:
        return _Pair(*(torch.zeros(count, dtype=each, device=device) for each in (first, second)))

    own, compared, theirs = columns(dtype, torch.bool), columns(torch.bool, dtype), columns(dtype, torch.bool)
    for rows in chunks(count, model.head.vocab_size, 1 if reference is None else 2, chunk_bytes):
        log_q = model.head.logits(model.hidden[rows]).log_softmax(-1)
        best = _judge(own, rows, log_q, labels)
        if reference is not None:
            log_p = reference.head.logits(reference.hidden[rows]).to(dtype).log_softmax(-1)
            compared.first[rows] = best == _judge(theirs, rows, log_p, labels)
            compared.second[rows] = forward_kl(log_q, log_p)[0]
    return own, compared, theirs


def _judge(columns: _Pair, rows: slice, log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Writes likelihood and correctness of some rows into the columns, and returns the likeliest tokens."""
    best = log_probabilities.argmax(-1)
    columns.first[rows] = -log_probabilities.gather(1, labels[rows, None]).squeeze(1)
    columns.second[rows] = best == labels[rows]
    return best


def _spread(column: Tensor, index: Tensor | None, labels: Tensor) -> Tensor:
    if index is None:
        return column.reshape(labels.shape)
    spread = torch.zeros(labels.numel(), dtype=column.dtype, device=column.device)
    return spread.index_copy_(0, index, column).reshape(labels.shape)


def _ratio(amount: float | int, count: int, noun: str) -> float:
    if count <= 0:
        raise DataError(f"scoring: at least one {noun} is required (got {count})")
    return amount / count
