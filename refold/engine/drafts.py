"""Lossless drafting: early depths or earlier text guess tokens, and one span of the whole stack verifies them."""

import time
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from refold.engine.acceptance import Accepted, accept_drafts, lookup_draft
from refold.engine.launch import Leaving
from refold.engine.randomness import RandomStream
from refold.engine.sampler import Sampler
from refold.engine.sequence import Sequence, Span
from refold.engine.settings import Drafts
from refold.modeling.model import RefoldForCausalLM

_FADING = 0.95
"""Weight of the past in the running share of accepted drafts."""
_TRIAL = 24
"""Launches for which a number of guesses is tried before its speed is judged."""
_TERM = 12
"""Trials' worth of launches for which the faster number is kept before both are tried again."""


class Drafter:
    """Guesses tokens and verifies guesses.

    With g guesses of which each is accepted with probability a, a verified span brings (1 - a^(g+1)) / (1 - a) tokens;
    it costs one pass of the whole stack and g more of the depths that guess (arXiv 2211.17192).

    Args:
        model: The model.
        sampler: Draws and distributions.
        settings: Of drafting.
        depth: Number of depths that guess; 0 for looked-up text.
    """

    def __init__(self, model: RefoldForCausalLM, sampler: Sampler, settings: Drafts, depth: int):
        self._model, self._sampler, self._settings, self.depth = model, sampler, settings, depth
        self._cost = depth / len(model.model.depths)
        self.num_drafted = self.num_accepted = 0
        self._share = 0.8
        self._trial = SpeedTrial(_TRIAL, _TERM)

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were accepted; 0 where none was drafted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    def allows(self, sequence: Sequence) -> bool:
        """Says whether a sequence may draft: nothing is forced on it, and its end is not the next token.

        A constraint knows the tokens that may follow certain ones, not those that may follow guesses.
        """
        request = sequence.request
        is_free = request.forced is None and request.grammar is None
        return is_free and request.max_new_tokens - sequence.num_new > 1

    def look_up(self, sequence: Sequence) -> None:
        """Drafts tokens that followed the last words of a sequence before."""
        if self._settings.source == "lookup" and self.allows(sequence):
            room = sequence.request.max_new_tokens - sequence.num_new - 1
            sequence.drafts = lookup_draft(sequence.tokens, min(self.num_wanted(), room))
            sequence.draft_probs = None

    def num_wanted(self) -> int:
        """Returns the number of guesses of the next spans.

        By the present share of accepted guesses one number pays best; it is compared with no guesses by the clock,
        because the cost of a launch of more tokens depends on the machine and the other rows.
        """
        most = self._settings.tokens - 1 if self._settings.source == "exit" else self._settings.tokens
        if not self._settings.adapt:
            return most
        return self._best(most) if self._trial.is_on else 0

    def observe(self, num_tokens: int, num_rows: int) -> None:
        """Takes the number of new tokens since the engine began, after each launch, with the number of rows."""
        if self._settings.adapt:
            self._trial.observe(num_tokens, num_rows)

    def _best(self, most: int) -> int:
        share = min(self._share, 0.999)

        def gain(guesses: int) -> float:
            return (1 - share ** (guesses + 1)) / (1 - share) / (1 + guesses * self._cost)

        return max(range(1, most + 1), key=gain, default=0)

    def guess(self, leaving: Leaving) -> None:
        """Adds a guess to each sequence whose last token, certain or guessed, has reached the drafting depth.

        Args:
            leaving: The streams there, one token each.
        """
        logits = self._model.logits_after(leaving.depth, leaving.streams)
        tokens = logits.argmax(-1).tolist()
        sequences = [span.sequence for span in leaving.spans]
        # Rows that draw keep the distribution of each guess; the others have none, whatever runs beside them.
        drawing = [index for index, each in enumerate(sequences) if each.request.sampling.temperature > 0]
        if drawing:
            rows = [sequences[index].row for index in drawing]
            places = [sequences[index].num_new + len(sequences[index].drafts) for index in drawing]
            probabilities = self._sampler.probabilities(logits[drawing], rows)
            drawn = self._sampler.draw(probabilities, rows, places, RandomStream.DRAFT).tolist()
            for index, token, row in zip(drawing, drawn, probabilities, strict=True):
                tokens[index] = token
                sequences[index].draft_probs = [*(sequences[index].draft_probs or ()), row]
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.drafts.append(token)

    def verify(self, guessed: Items[tuple[Span, Tensor]]) -> list[tuple[Span, Accepted, int]]:
        """Compares guesses with the whole stack's predictions.

        Args:
            guessed: Spans, each of which asks for one prediction more than it has guesses, and their logits
                `[asks, N]`.

        Returns:
            For each span the verdict of its group, and its index there.
        """
        groups: dict[tuple[int, bool], list[tuple[Span, Tensor]]] = {}
        for span, logits in guessed:
            groups.setdefault((span.asks, span.sequence.draft_probs is not None), []).append((span, logits))
        found = []
        for (asks, has_probabilities), members in groups.items():
            sequences = [span.sequence for span, _ in members]
            drafts = torch.tensor([sequence.drafts[: asks - 1] for sequence in sequences], device=members[0][1].device)
            probabilities = None
            if has_probabilities:
                probabilities = torch.stack([torch.stack(sequence.draft_probs or []) for sequence in sequences])
            accepted = accept_drafts(
                self._sampler,
                torch.stack([rows for _, rows in members]),
                drafts,
                [sequence.row for sequence in sequences],
                [sequence.num_new for sequence in sequences],
                probabilities,
            )
            self._count(accepted.counts, asks - 1)
            found += [(span, accepted, index) for index, (span, _) in enumerate(members)]
        return found

    def _count(self, counts: Items[int], guesses: int) -> None:
        for count in counts:
            # Guesses after the first refused one say nothing.
            judged = min(count + 1, guesses)
            self.num_drafted += guesses
            self.num_accepted += count
            if judged:
                weight = _FADING**judged
                self._share = self._share * weight + (count / judged) * (1 - weight)


class SpeedTrial:
    """Compares two ways to run, on and off, by the clock: both are tried in turn, and the faster is kept for a while.

    Args:
        trial: Launches of a trial.
        term: Trials' worth of launches for which the faster is kept.
    """

    def __init__(self, trial: int, term: int):
        self._trial, self._term = trial, term
        self.is_on = True
        self._rates: dict[bool, float] = {}
        self._launches = 0
        self._row_seconds = 0.0
        self._before: tuple[int, float] | None = None
        self._tokens = 0

    def observe(self, num_tokens: int, num_rows: int) -> None:
        """Counts a launch.

        Args:
            num_tokens: New tokens since the engine began.
            num_rows: Rows that are running; speed is counted for each of them.
        """
        now = time.perf_counter()
        if self._before is None or not num_rows:
            self._before = num_tokens, now
            return
        self._tokens += num_tokens - self._before[0]
        self._row_seconds += (now - self._before[1]) * num_rows
        self._before = num_tokens, now
        self._launches += 1
        wanted = self._trial if len(self._rates) < len((True, False)) else self._trial * self._term
        if self._launches < wanted:
            return
        if len(self._rates) < len((True, False)):
            self._rates[self.is_on] = self._tokens / self._row_seconds
            both = len(self._rates) == len((True, False))
            self.is_on = self._rates[True] >= self._rates[False] if both else not self.is_on
        else:
            self._rates.clear()
        self._launches, self._tokens, self._row_seconds = 0, 0, 0.0
