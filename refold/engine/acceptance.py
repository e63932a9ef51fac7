"""Acceptance of drafted tokens by the target's logits, and drafts from the text itself."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from refold.engine.randomness import RandomStream
from refold.engine.sampler import Alternatives, Logprobs, RowNumbers, Sampler


class Accepted(NamedTuple):
    """Decisions about the drafts of some rows.

    Attributes:
        counts: Number of accepted drafts.
        next_tokens: The token after them: the correction of a rejected draft, or the token after all drafts; None
            where all drafts were accepted and there are no logits after the last.
        tokens: The new tokens: the accepted drafts and the next token.
        finite: Whether the logits of all new tokens were finite; the tokens of other rows mean nothing.
        gaps: For each new token the distance between the two largest logits, after penalties and bias.
        logprobs: For each new token its log-probability under the model; None where it was not asked for.
        alternatives: For each new token the likeliest tokens; None where they were not asked for.
    """

    counts: list[int]
    next_tokens: list[int | None]
    tokens: list[list[int]]
    finite: list[bool]
    gaps: list[list[float]]
    logprobs: list[Logprobs]
    alternatives: list[Alternatives]


def accept_drafts(
    sampler: Sampler,
    logits: Float[Tensor, "m T N"],
    drafts: Int64[Tensor, "m k"],
    rows: RowNumbers,
    places: RowNumbers,
    draft_probabilities: Float[Tensor, "m k N"] | None = None,
) -> Accepted:
    """Decides which drafts become new tokens, so that these are distributed as without drafts.

    Greedy rows accept what equals the target's likeliest token. Other rows accept draft x with probability
    min(1, p(x) / q(x)), p the target's and q the draft's distribution; after a rejection the next token is drawn from
    max(0, p - q), scaled to one (arXiv 2211.17192, algorithm 1). Drafts that were not drawn need no q: the token that
    `choose` would draw is compared with the draft, which accepts with probability p(x) too and gives the same tokens
    as without drafts.

    Args:
        sampler: Settings of the rows. Tokens before the drafts are noted; the new tokens are not yet.
        logits: Logits of the target for the place of each draft, and for the place after the last (T = k + 1) or not
            (T = k).
        drafts: Drafted tokens; -1 pads rows with fewer.
        rows: Row of each.
        places: Number of new tokens before the first draft.
        draft_probabilities: The distributions q that drafts were drawn from with the stream `DRAFT`.
    """
    num_rows, length, size = logits.shape
    where, first = np.asarray(rows, dtype=np.int64), np.asarray(places, dtype=np.int64)
    each_row = np.repeat(where, length)
    each_place = (first[:, None] + np.arange(length)).reshape(-1)
    before, flat = _drafts_before(drafts, length), logits.reshape(-1, size)
    scores = sampler.scores(flat, each_row, before)
    picked, largest, gaps = (each.view(num_rows, length) for each in sampler.pick(scores, each_row, each_place))
    padded = torch.nn.functional.pad(drafts, (0, length - drafts.shape[1]), value=-1)
    accepted, instead = padded == picked, picked
    drawn = np.flatnonzero(sampler.draws(where))
    if draft_probabilities is not None and len(drawn):
        at = torch.from_numpy(drawn).to(logits.device)
        within = (drawn[:, None] * length + np.arange(length)).reshape(-1)
        flat_at = torch.from_numpy(within).to(logits.device)
        target = sampler.probabilities(flat[flat_at], each_row[within], before[flat_at]).unflatten(0, (-1, length))
        found = _compare(sampler, drafts[at], target, draft_probabilities[at], (each_row[within], each_place[within]))
        accepted[at, : drafts.shape[1]] = found[0]
        # A place without a draft, or after all, gets the token that is drawn as without drafts.
        instead[at, : drafts.shape[1]] = torch.where(drafts[at] < 0, instead[at, : drafts.shape[1]], found[1])
    counts = accepted.cumprod(dim=1).sum(dim=1).tolist()
    return _collect(sampler, flat, where, counts, (padded, instead, largest, gaps))


def _drafts_before(drafts: Tensor, length: int) -> Tensor:
    """Returns the drafts before each place, `[m * T, k]`, padded with -1."""
    num_drafts = drafts.shape[1]
    is_before = torch.arange(num_drafts, device=drafts.device) < torch.arange(length, device=drafts.device)[:, None]
    return torch.where(is_before, drafts[:, None], -1).reshape(-1, num_drafts)


def _compare(
    sampler: Sampler,
    drafts: Int64[Tensor, "d k"],
    target: Float64[Tensor, "d T N"],
    proposed: Float[Tensor, "d k N"],
    rows_and_places: tuple[np.ndarray, np.ndarray],
) -> tuple[Bool[Tensor, "d k"], Int64[Tensor, "d k"]]:
    """Returns which drafts are accepted, and the tokens that replace them otherwise."""
    num_drafts, proposed = drafts.shape[1], proposed.double()
    target = target[:, :num_drafts]
    rows, places = (each.reshape(len(drafts), -1)[:, :num_drafts].reshape(-1) for each in rows_and_places)
    token = drafts.clamp(min=0)[:, :, None]
    numbers = sampler.uniforms(rows, places, RandomStream.ACCEPT).view(drafts.shape)
    wanted, given = (each.gather(2, token)[:, :, 0] for each in (target, proposed))
    rest = (target - proposed).clamp(min=0)
    # Equal distributions reject nothing; a rest of zeros could not be drawn from.
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, target)
    corrections = sampler.draw(rest.flatten(0, 1), rows, places, RandomStream.CORRECT).view(drafts.shape)
    return (numbers * given < wanted) & (drafts >= 0), corrections


def _collect(
    sampler: Sampler,
    logits: Float[Tensor, "P N"],
    rows: np.ndarray,
    counts: list[int],
    parts: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Accepted:
    """Collects the new tokens of each row, from drafts, corrections, largest scores and gaps of all places."""
    drafts, instead, largest, gaps = (each.tolist() for each in parts)
    length = parts[0].shape[1]
    tokens: list[list[int]] = []
    next_tokens: list[int | None] = []
    for row, count in enumerate(counts):
        next_tokens.append(instead[row][count] if count < length else None)
        tokens.append([*drafts[row][:count], *instead[row][count : count + 1]])
    logprobs: list[Logprobs] = [[None] * len(each) for each in tokens]
    alternatives: list[Alternatives] = [[None] * len(each) for each in tokens]
    asked = np.flatnonzero(sampler.wants_logprobs(rows)).tolist()
    places = [(row, place) for row in asked for place in range(len(tokens[row]))]
    if places:
        at = torch.tensor([row * length + place for row, place in places], device=logits.device)
        found = sampler.logprobs(
            logits[at], rows[[row for row, _ in places]], [tokens[row][place] for row, place in places]
        )
        for (row, place), one, many in zip(places, *found, strict=True):
            logprobs[row][place], alternatives[row][place] = one, many
    return Accepted(
        counts,
        next_tokens,
        tokens,
        [all(map(math.isfinite, each[: len(new)])) for each, new in zip(largest, tokens, strict=True)],
        [each[: len(new)] for each, new in zip(gaps, tokens, strict=True)],
        logprobs,
        alternatives,
    )


def lookup_draft(tokens: Sequence[int], k: int, longest: int = 3) -> list[int]:
    """Drafts the tokens that followed the last earlier occurrence of the text's end (prompt look-up).

    Args:
        tokens: All tokens so far.
        k: Number of drafts.
        longest: Most tokens of the end that are looked for; fewer are tried after it.

    Returns:
        `k` tokens, which repeat where the text ends before; none where the last token is new.
    """
    text = np.asarray(tokens, dtype=np.int64)
    for length in range(min(longest, len(text) - 1), 0, -1):
        end = text[len(text) - length :]
        # Windows that end before the last token, so that at least one token follows.
        matches = np.ones(len(text) - length, dtype=bool)
        for place, token in enumerate(end):
            matches &= text[place : place + len(matches)] == token
        found = np.flatnonzero(matches)
        if len(found):
            begin = int(found[-1]) + length
            return np.resize(text[begin:], k).tolist()
    return []
