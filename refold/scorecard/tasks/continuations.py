"""Log-likelihoods of continuations: a context that several continuations share runs once.

Rows of tokens that begin alike form a group. The shared tokens of the groups of a batch run once, without padding: the
batch cuts all of them at one length, and the tokens behind the cut go with the continuations. Then the cache is
repeated for each continuation, and all continuations of the batch run together. Padding is on the right only, where a
causal model never reads it from a real token. So no mask is needed, and every mixer with a cache works.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from refold.modeling.cache_name import CACHE_NAME
from refold.modeling.recurrent_cache import new_cache
from refold.progress import Report
from refold.scoring.head import CHUNK_BYTES, Head, chunks
from refold.scoring.predict import head_of

BATCH_TOKENS = 2048
"""Tokens of a batch, padding included."""
SMALL_BATCH = 256
"""Tokens below which a batch takes more groups whatever their padding: it is read from memory more than computed."""
MOST_PADDING = 1.15
"""Most tokens of a larger batch, as a factor of those without padding and repeated tokens."""
LEAST_SHARED = 8
"""Fewest shared tokens that are worth a second forward pass."""
KEPT_TOKENS = 16
"""Most tokens that the repeated cache of a batch holds, as a factor of the tokens of the batch."""


class AnswerTokens(NamedTuple):
    """Tokens whose log-likelihood is wanted, with those before them.

    Attributes:
        tokens: All tokens, the context's first.
        num_scored: Number of last tokens to score; at least one token stands before them.
    """

    tokens: Sequence[int]
    num_scored: int


class Likelihood(NamedTuple):
    """The score of a continuation.

    Attributes:
        log_likelihood: Sum of the log probabilities of its tokens, in nats.
        is_greedy: Whether each of its tokens is the model's likeliest.
    """

    log_likelihood: float
    is_greedy: bool


@dataclass
class _Row:
    """Input tokens that one or more continuations need: all of their tokens but the last."""

    tokens: tuple[int, ...]
    start: int
    """First position whose prediction is scored."""
    wanted: list[int] = field(default_factory=list)
    """Index of each continuation."""


@dataclass
class _Group:
    rows: list[_Row]
    shared: int
    """Tokens at the beginning that all rows share, all of them before the first scored position."""

    @property
    def longest(self) -> int:
        return max(len(row.tokens) for row in self.rows)


class _Batch(NamedTuple):
    groups: list[_Group]
    cut: int
    """Tokens of each group that run once; 0: the rows run whole."""


@torch.inference_mode()
def score_continuations(
    model: PreTrainedModel,
    wanted: Sequence[AnswerTokens],
    *,
    batch_tokens: int = BATCH_TOKENS,
    least_shared: int | None = LEAST_SHARED,
    progress: Report | None = None,
) -> list[Likelihood]:
    """Returns the log-likelihood of each continuation.

    Args:
        model: A folded model or a source, on its device, in evaluation mode.
        wanted: The continuations, in any order.
        batch_tokens: Tokens of a batch, padding included.
        least_shared: Fewest shared tokens that run once; None: every continuation runs with its whole context.
        progress: Gets the number of scored continuations and of all.
    """
    head = head_of(model)
    found: list[Likelihood | None] = [None] * len(wanted)
    done = 0
    for batch in _batches(_groups(_rows(wanted), least_shared), batch_tokens):
        rows = [row for group in batch.groups for row in group.rows]
        hidden = _run(model, batch)
        for index, score in _score(head, hidden, rows, batch.cut, wanted):
            found[index] = score
            done += 1
        if progress is not None:
            progress(done, len(wanted))
    return [score for score in found if score is not None]


def _rows(wanted: Sequence[AnswerTokens]) -> list[_Row]:
    """Returns the distinct rows of input tokens, in lexicographic order."""
    rows: dict[tuple[int, ...], _Row] = {}
    for index, each in enumerate(wanted):
        tokens = tuple(each.tokens[:-1])
        start = len(tokens) - each.num_scored
        row = rows.setdefault(tokens, _Row(tokens, start))
        row.start = min(row.start, start)
        row.wanted.append(index)
    return [rows[tokens] for tokens in sorted(rows)]


def _groups(rows: Sequence[_Row], least_shared: int | None) -> list[_Group]:
    """Joins neighbours while this saves tokens: `shared` of the new row, less those that the others lose."""
    if least_shared is None:
        return [_Group([row], 0) for row in rows]
    groups: list[_Group] = []
    for row in rows:
        last = groups[-1] if groups else None
        if last is not None:
            # Neighbours in lexicographic order: the last row shares most.
            shared = min(last.shared, row.start, _common(last.rows[-1].tokens, row.tokens))
            lost = (last.shared - shared) * len(last.rows) if len(last.rows) > 1 else 0
            if shared >= least_shared and shared > lost:
                last.rows.append(row)
                last.shared = shared
                continue
        groups.append(_Group([row], row.start))
    return groups


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _batches(groups: Sequence[_Group], batch_tokens: int) -> Iterator[_Batch]:
    """Yields batches of groups of about one length; those that share nothing run without a cache."""
    alone = sorted((each for each in groups if len(each.rows) == 1), key=lambda each: -each.longest)
    together = sorted((each for each in groups if len(each.rows) > 1), key=lambda each: (-each.shared, -each.longest))
    for pool, shares in ((together, True), (alone, False)):
        batch: list[_Group] = []
        for group in pool:
            if batch and not _fits([*batch, group], shares, batch_tokens):
                yield _batch(batch, shares)
                batch = []
            batch.append(group)
        if batch:
            yield _batch(batch, shares)


def _batch(groups: list[_Group], shares: bool) -> _Batch:
    return _Batch(groups, min(group.shared for group in groups) if shares else 0)


def _fits(groups: list[_Group], shares: bool, batch_tokens: int) -> bool:
    cut = _batch(groups, shares).cut
    num_rows = sum(len(group.rows) for group in groups)
    longest = max(group.longest for group in groups)
    tokens = cut * len(groups) + num_rows * (longest - cut)
    if tokens > batch_tokens or (shares and num_rows * longest > KEPT_TOKENS * batch_tokens):
        return False
    least = sum(
        (group.shared if shares else 0) + sum(len(row.tokens) - (group.shared if shares else 0) for row in group.rows)
        for group in groups
    )
    return tokens <= max(SMALL_BATCH, MOST_PADDING * least)


def _run(model: PreTrainedModel, batch: _Batch) -> Float[Tensor, "B T D"]:
    """Returns the hidden states of the rows behind the cut."""
    stack: Any = model.base_model
    rows = [row for group in batch.groups for row in group.rows]
    rest = _padded([row.tokens[batch.cut :] for row in rows], model.device)
    if not batch.cut:
        return stack(input_ids=rest, use_cache=False).last_hidden_state
    cache = new_cache(model.config)
    shared = torch.tensor([group.rows[0].tokens[: batch.cut] for group in batch.groups], device=model.device)
    stack(input_ids=shared, use_cache=True, **{CACHE_NAME: cache})
    owners = [place for place, group in enumerate(batch.groups) for _ in group.rows]
    cache.reorder_cache(torch.tensor(owners, device=model.device))  # type: ignore[arg-type]
    return stack(input_ids=rest, use_cache=True, **{CACHE_NAME: cache}).last_hidden_state


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Int64[Tensor, "B T"]:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def _score(
    head: Head, hidden: Float[Tensor, "B T D"], rows: Sequence[_Row], cut: int, wanted: Sequence[AnswerTokens]
) -> Iterator[tuple[int, Likelihood]]:
    """Yields index and score of the continuations of some rows, with the logits of some positions in memory."""
    states = torch.cat([hidden[place, row.start - cut : len(row.tokens) - cut] for place, row in enumerate(rows)])
    positions, targets, lengths, order, offset = [], [], [], [], 0
    for row in rows:
        end = offset + len(row.tokens) - row.start
        for index in row.wanted:
            count = wanted[index].num_scored
            positions += range(end - count, end)
            targets += wanted[index].tokens[-count:]
            lengths.append(count)
            order.append(index)
        offset = end
    likely, greedy = _token_scores(head, states, torch.tensor(positions), torch.tensor(targets))
    for index, each, is_greedy in zip(order, likely.split(lengths), greedy.split(lengths), strict=True):
        yield index, Likelihood(float(each.sum()), bool(is_greedy.all()))


def _token_scores(
    head: Head, states: Float[Tensor, "M D"], positions: Int64[Tensor, "K"], targets: Int64[Tensor, "K"]
) -> tuple[Tensor, Tensor]:
    """Returns the log probability of each target at its position, and whether it is the likeliest token."""
    likely = torch.empty(len(targets), dtype=torch.promote_types(states.dtype, torch.float32))
    greedy = torch.empty(len(targets), dtype=torch.bool)
    for part in chunks(len(states), head.vocab_size, 2, CHUNK_BYTES):
        logits = head.logits(states[part])
        here = ((positions >= part.start) & (positions < part.stop)).nonzero().squeeze(-1)
        rows = (positions[here] - part.start).to(logits.device)
        aims = targets[here].to(logits.device)
        likely[here] = (logits[rows, aims] - logits.logsumexp(-1)[rows]).to(likely.dtype).cpu()
        greedy[here] = (logits.argmax(-1)[rows] == aims).cpu()
    return likely, greedy
