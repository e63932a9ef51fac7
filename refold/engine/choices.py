"""The growth and the end of choices: tokens are added, listeners told, and rows given back."""

import time

from refold.engine.report import Statistics
from refold.engine.results import Continuation, Reason
from refold.engine.sampler import Sampler
from refold.engine.scheduler import Scheduler
from refold.engine.sequence import Request, Sequence

TIE = 1e-4
"""Gap of the two likeliest logits below which another order of sums may exchange them."""


class OpenChoices:
    """Adds tokens to choices and ends them.

    Args:
        scheduler: Takes back rows and pages.
        sampler: Counts tokens for penalties and constraints.
        statistics: Counts tokens and depths.
    """

    def __init__(self, scheduler: Scheduler, sampler: Sampler, statistics: Statistics):
        self._scheduler, self._sampler, self._statistics = scheduler, sampler, statistics
        self._finished: list[Request] = []

    @property
    def has_finished(self) -> bool:
        """Whether a request has ended that nobody has taken."""
        return bool(self._finished)

    def take_finished(self) -> list[Request]:
        """Returns the requests that have ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def accept(self, sequence: Sequence, token: int, depth: int, gap: float) -> bool:
        """Appends a token; says whether the sequence goes on.

        Args:
            sequence: Which.
            token: The token.
            depth: Number of depths that computed it.
            gap: Distance between the two largest logits.
        """
        request, place = sequence.request, sequence.num_new
        if request.forced is not None:
            request.predicted.setdefault(sequence.number, []).append(token)
            token = request.forced[place]
        if request.told is None:
            request.told = time.perf_counter()
            self._scheduler.queue.extendleft(reversed(request.siblings))
            request.siblings = []
        if gap < TIE:
            sequence.ties.append(place)
        sequence.tokens.append(token)
        sequence.depths.append(depth)
        self._sampler.note(sequence.row, token)
        self._statistics.new_tokens += 1
        self._statistics.depths[depth] = self._statistics.depths.get(depth, 0) + 1
        ended, fault = sequence.text.add(token), None
        if not ended and request.grammar is not None:
            fault = self._sampler.fault(sequence.row)
            if fault is not None or self._sampler.is_complete(sequence.row):
                sequence.text.end("stop" if fault is None else "error")
                ended = True
        if request.listener is not None:
            request.listener(sequence.tell(token, fault))
        if ended:
            self._end(sequence, fault)
        return not ended

    def end(self, sequence: Sequence, reason: Reason, error: str | None = None) -> None:
        """Ends a sequence for a reason outside its tokens.

        Args:
            sequence: Which.
            reason: Why.
            error: The fault in one sentence; the memory of the sequence may be spoiled then.
        """
        sequence.text.end(reason)
        if sequence.request.listener is not None:
            sequence.request.listener(sequence.tell(error=error))
        self._end(sequence, error)

    def _end(self, sequence: Sequence, error: str | None = None) -> None:
        """Gives back the row, pages and states of a sequence and keeps its choice."""
        if sequence.row >= 0:
            self._sampler.clear(sequence.row)
        self._scheduler.end(sequence, spoiled=error is not None)
        text, request = sequence.text, sequence.request
        siblings, request.siblings = request.siblings, []
        for sibling in siblings:
            # The first choice ended before its first token: the others cannot do better.
            self.end(sibling, text.reason if text.reason in ("cancelled", "length") else "error", error)
        count = len(text.token_ids)
        asked = request.sampling.logprobs
        request.choices[sequence.number] = Continuation(
            text.text,
            tuple(text.token_ids),
            tuple(sequence.depths[:count]),
            text.reason or "error",
            text.stop,
            None if asked is None else tuple(sequence.logprobs[:count]),
            tuple(sequence.alternatives[:count]) if asked else None,
            tuple(sequence.ties),
            error,
        )
        if request.is_finished:
            self._finished.append(request)
