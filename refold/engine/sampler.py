"""Continuation of new tokens for all rows at once, each row with its own settings."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from refold.engine.buffer import Buffer
from refold.engine.columns import draw, draw_in_order, likeliest
from refold.engine.distributions import Distributions
from refold.engine.grammar_masks import GrammarMasks
from refold.engine.grammars import Grammar
from refold.engine.logit_changes import LogitChanges
from refold.engine.logprobs import token_logprobs
from refold.engine.randomness import RandomStream, key, uniforms
from refold.engine.results import TokenLogprob
from refold.generation.limits import require_known_biases
from refold.generation.sampling import Sampling

RowNumbers = Sequence[int] | np.ndarray
"""A whole number for each row."""
Logprobs = list[TokenLogprob | None]
Alternatives = list[tuple[TokenLogprob, ...] | None]


class Chosen(NamedTuple):
    """New tokens of some rows.

    Attributes:
        tokens: Token ids; 0 where the logits were not finite.
        finite: Whether the largest logit was finite.
        gaps: Distances between the two largest logits, after penalties and bias.
        logprobs: Log-probability of each token under the model; None where it was not asked for.
        alternatives: The likeliest tokens under the model; None where they were not asked for.
    """

    tokens: list[int]
    finite: list[bool]
    gaps: list[float]
    logprobs: Logprobs
    alternatives: Alternatives


class Sampler:
    """Settings and counts of the running choices, and the choice of their next tokens.

    Args:
        vocab_size: Number of logits.
        max_rows: Most choices at a time.
        device: Device of the logits.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device | str = "cpu"):
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self._changes = LogitChanges(max_rows, self.device)
        self._distributions = Distributions(max_rows, self.device)
        self._buffer = Buffer(self.device)
        self._keys = np.zeros(max_rows, dtype=np.uint64)
        self._logprobs = np.full(max_rows, -1)
        self._masks = GrammarMasks(vocab_size)

    def require_fitting(self, sampling: Sampling) -> None:
        """Checks that settings fit the vocabulary.

        Raises:
            RefoldError: A token of `logit_bias` is outside it.
        """
        require_known_biases(sampling, self.vocab_size)

    def set(
        self,
        row: int,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        choice: int = 0,
        *,
        grammar: Grammar | None = None,
    ) -> None:
        """Gives a row to a choice.

        Args:
            row: The row.
            sampling: The settings of its request.
            prompt_ids: Tokens of the prompt.
            choice: Which of the request's `n` choices it is; each draws other numbers.
            grammar: Compiled constraint; None: any text.

        Raises:
            RefoldError: A token of `logit_bias` is outside the vocabulary.
        """
        self.require_fitting(sampling)
        self._changes.set(row, sampling, prompt_ids)
        self._distributions.set(row, sampling)
        self._keys[row] = key(sampling.seed, choice)
        self._logprobs[row] = -1 if sampling.logprobs is None else min(sampling.logprobs, self.vocab_size)
        self._masks.set(row, grammar)

    def clear(self, row: int) -> None:
        """Takes a row back from a choice that has ended."""
        self._changes.clear(row)
        self._masks.set(row, None)
        self._logprobs[row] = -1

    def note(self, row: int, token: int) -> None:
        """Counts a new token of a row for its penalties and its constraint."""
        self._changes.note(row, token)
        self._masks.note(row, token)

    def is_complete(self, row: int) -> bool:
        """Says whether the constraint of a row lets no more text follow."""
        return self._masks.is_complete(row)

    def fault(self, row: int) -> str | None:
        """Returns why the constraint of a row cannot go on, in one sentence; None: it can."""
        return self._masks.fault(row)

    def choose(self, logits: Float[Tensor, "R N"], rows: RowNumbers, places: RowNumbers) -> Chosen:
        """Chooses the next token of each row: the likeliest, or drawn by one random number in row order of ids.

        Args:
            logits: Logits of the model.
            rows: Row of each.
            places: Number of new tokens that each row has.
        """
        where = np.asarray(rows, dtype=np.int64)
        scores = self._masks.apply(self._changes.apply(logits, where), logits, where)
        tokens, largest, gaps = self.pick(scores, where, places)
        # One transfer from the device for everything.
        found = torch.stack((tokens.double(), largest.double(), gaps.double())).tolist()
        finite = [math.isfinite(each) for each in found[1]]
        chosen = [int(token) if is_finite else 0 for token, is_finite in zip(found[0], finite, strict=True)]
        return Chosen(chosen, finite, found[2], *self.logprobs(logits, where, chosen))

    def pick(
        self, scores: Float[Tensor, "R N"], rows: RowNumbers, places: RowNumbers
    ) -> tuple[Int64[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, " R"]]:
        """Returns the next token of each row, the largest score, and its distance to the second largest.

        Args:
            scores: Logits after bias and penalties.
            rows: Row of each; a row may occur several times.
            places: Number of new tokens before each.
        """
        where = np.asarray(rows, dtype=np.int64)
        tokens, largest, gaps = likeliest(scores)
        for group in self._distributions.candidates(scores, where):
            numbers = self.uniforms(where[group.rows], np.asarray(places)[group.rows], RandomStream.PLAIN)
            if group.ids is None:
                found = draw(group.weights, numbers)
            else:
                found = group.ids.gather(1, draw_in_order(group.weights, numbers)[:, None])[:, 0]
            tokens[self._tensor(group.rows)] = found
        return tokens, largest, gaps

    def scores(
        self, logits: Float[Tensor, "R N"], rows: RowNumbers, drafts: Int64[Tensor, "R E"] | None = None
    ) -> Float[Tensor, "R N"]:
        """Returns logits after bias and penalties, in a buffer that the next call overwrites if they are changed.

        Args:
            logits: Logits of the model.
            rows: Row of each; a row may occur several times.
            drafts: Tokens after the noted ones, padded with -1, that penalties count too.
        """
        return self._changes.apply(logits, np.asarray(rows, dtype=np.int64), drafts)

    def probabilities(
        self, logits: Float[Tensor, "R N"], rows: RowNumbers, drafts: Int64[Tensor, "R E"] | None = None
    ) -> Float64[Tensor, "R N"]:
        """Returns the distributions that `choose` draws from; arguments as for `scores`.

        The distribution of a greedy row has its whole mass on one token.
        """
        where = np.asarray(rows, dtype=np.int64)
        scores = self.scores(logits, where, drafts)
        found = torch.zeros(scores.shape, dtype=torch.float64, device=scores.device)
        for group in self._distributions.candidates(scores, where):
            weights, at = group.weights.double(), self._tensor(group.rows)
            weights /= weights.sum(dim=-1, keepdim=True)
            # Padding is token 0 with a weight of 0.
            found[at] = weights if group.ids is None else found[at].scatter_add_(1, group.ids, weights)
        greedy = self._tensor(np.flatnonzero(~self._distributions.draws[where]))
        if len(greedy):
            found[greedy, likeliest(scores[greedy])[0]] = 1.0
        return found

    def draws(self, rows: RowNumbers) -> Bool[np.ndarray, " R"]:
        """Tells for each row whether its tokens are drawn; the others take the likeliest."""
        return self._distributions.draws[np.asarray(rows, dtype=np.int64)]

    def wants_logprobs(self, rows: RowNumbers) -> Bool[np.ndarray, " R"]:
        """Tells for each row whether it asked for log-probabilities."""
        return self._logprobs[np.asarray(rows, dtype=np.int64)] >= 0

    def uniforms(self, rows: RowNumbers, places: RowNumbers, stream: int) -> Float64[Tensor, " R"]:
        """Returns random numbers in [0, 1), which depend on seed, choice, place and stream alone.

        Args:
            rows: The rows.
            places: Number of new tokens before each row's token.
            stream: Their use, a `RandomStream`.
        """
        numbers = uniforms(self._keys[np.asarray(rows)], np.asarray(places, dtype=np.uint64), int(stream))
        return self._tensor(numbers)

    def draw(
        self, probabilities: Float64[Tensor, "R N"], rows: RowNumbers, places: RowNumbers, stream: int
    ) -> Int64[Tensor, " R"]:
        """Draws a token of each row; probabilities need no certain sum."""
        return draw(probabilities, self.uniforms(rows, places, stream))

    def logprobs(
        self, logits: Float[Tensor, "R N"], rows: RowNumbers, tokens: RowNumbers
    ) -> tuple[Logprobs, Alternatives]:
        """Returns the log-probabilities of tokens, and of the likeliest ones, under the model, before any setting.

        Args:
            logits: Logits of the model.
            rows: Row of each.
            tokens: The new token of each.

        Returns:
            For each row the token's and the alternatives' log-probabilities; None where they were not asked for.
        """
        wanted = self._logprobs[np.asarray(rows, dtype=np.int64)]
        one: Logprobs = [None] * len(wanted)
        many: Alternatives = [None] * len(wanted)
        asked = np.flatnonzero(wanted >= 0)
        if len(asked):
            part = logits if len(asked) == len(logits) else logits[self._tensor(asked)]
            chosen = self._tensor(np.asarray(tokens)[asked])
            found = token_logprobs(part, chosen, wanted[asked].tolist(), self._buffer)
            for row, told in zip(asked.tolist(), found, strict=True):
                one[row], many[row] = TokenLogprob(told.token, told.logprob), told.alternatives
        return one, many

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
