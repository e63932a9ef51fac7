"""The scheduler: which sequences have rows and pages, and which spans share the next launch."""

from collections import Counter, deque
from collections.abc import Collection, Iterator
from typing import Any

from refold.engine.policy import Policy, Ready, overdue
from refold.engine.pools import Pools
from refold.engine.sequence import Sequence, Span
from refold.engine.settings import EngineSettings


class Scheduler:
    """Admits sequences, and picks the spans of each launch.

    Args:
        pools: Rows and pages.
        policy: Chooses among passes.
        settings: Of the engine.
        flat: Whether spans of different lengths can share a launch.
    """

    def __init__(self, pools: Pools, policy: Policy, settings: EngineSettings, flat: bool):
        self._pools, self._policy, self._settings, self._flat = pools, policy, settings, flat
        self.queue: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        self._free_rows = list(range(settings.max_rows - 1, -1, -1))
        self._admissions = self._num_lost = 0
        self.num_preemptions = 0
        self.longest_wait = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not ended."""
        return bool(self.queue or self.running)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue."""
        self.queue.append(sequence)

    def admit(self) -> Iterator[Sequence]:
        """Gives rows and pages to waiting sequences as long as there are any, first come first served."""
        while self.queue and self._free_rows:
            sequence = self.queue[0]
            row = next((row for row in self._best_rows() if self._enter(sequence, row)), None)
            if row is None:
                return
            self.queue.popleft()
            self._free_rows.remove(row)
            sequence.row = row
            sequence.admitted = self._admissions = self._admissions + 1
            self.running[row] = sequence
            yield sequence

    def pick(self) -> list[Span]:
        """Returns the spans of the next launch, each with pages for its tokens; empty if no span is ready."""
        while spans := self._choose():
            held = self._with_pages(spans)
            if held:
                picked = {id(span) for span in held}
                for span in self.spans():
                    span.waited = 0 if id(span) in picked else span.waited + 1
                    self.longest_wait = max(self.longest_wait, span.waited)
                return held
        return []

    def has_others(self, kind: int, spans: list[Span]) -> bool:
        """Says whether spans that are in no launch could join one of a kind, or have waited to the bound."""
        inside = {id(span) for span in spans}
        bound = self._settings.max_wait
        return any(
            (span.segment.kind == kind or span.waited >= bound) and id(span) not in inside for span in self.spans()
        )

    def end(self, sequence: Sequence, spoiled: bool = False) -> None:
        """Takes a sequence out, wherever it stands, and gives back everything it holds.

        Args:
            sequence: One that was added.
            spoiled: Whether its keys may hold NaN.
        """
        if sequence.row >= 0:
            self._leave(sequence, spoiled)
        elif sequence in self.queue:
            self.queue.remove(sequence)
        sequence.forget()
        sequence.saved = None

    def lose(self) -> list[tuple[Sequence, str]]:
        """Gives up the rows whose pages are lost; returns the sequences that end with them, and the fault of each."""
        lost = self._pools.lost_shares()
        if len(lost) == self._num_lost:
            return []
        self._num_lost = len(lost)
        ended = [
            (sequence, error)
            for sequence in self.running.values()
            if (error := lost.get(self._pools.share(sequence.row))) is not None
        ]
        self.lose_rows(lost)
        if len(lost) == self._pools.num_shares:
            ended += [(sequence, next(iter(lost.values()))) for sequence in self.queue]
        return ended

    def lose_rows(self, shares: Collection[int]) -> None:
        """Gives no row of shares whose pages are lost to any sequence."""
        self._free_rows = [row for row in self._free_rows if self._pools.share(row) not in shares]

    def _best_rows(self) -> list[int]:
        """Returns a free row of each share, of the share with the fewest sequences first."""
        held = Counter(self._pools.share(row) for row in self.running)
        rows = {self._pools.share(row): row for row in self._free_rows}
        return sorted(rows.values(), key=lambda row: held[self._pools.share(row)])

    def _enter(self, sequence: Sequence, row: int) -> bool:
        pools = self._pools
        if sequence.saved is not None:
            if not pools.copy_in(row, sequence.saved):
                return False
            sequence.saved = None
            return True
        # A prefix that does not run again would have no predictions to score its tokens.
        shares = self._settings.share_prefixes and not sequence.scores_prompt
        cached = pools.attach_prefix(row, sequence.tokens, sequence.adapters_number) if shares else 0
        # Pages for the first piece: a window's pool may be too small for a whole prompt, and need not hold it at once.
        if not pools.reserve(row, min(len(sequence.tokens), cached + self._settings.chunk)):
            pools.release(row)
            return False
        sequence.num_run = cached
        if not sequence.num_new:
            sequence.request.cached_tokens = cached
        return True

    def _leave(self, sequence: Sequence, spoiled: bool = False) -> None:
        self._pools.release(sequence.row, spoiled)
        del self.running[sequence.row]
        if self._pools.share(sequence.row) not in self._pools.keeper.lost_shares():
            self._free_rows.append(sequence.row)
        sequence.row = -1

    def spans(self) -> Iterator[Span]:
        """Yields the spans that stand before a segment."""
        for sequence in self.running.values():
            if sequence.span is not None:
                yield sequence.span

    def _key(self, span: Span) -> Any:
        return span.segment.kind if self._flat else (span.segment.kind, span.length)

    def _choose(self) -> list[Span]:
        """Returns spans of one launch without a look at pages, longest waiting first."""
        groups: dict[Any, list[Span]] = {}
        for span in self.spans():
            groups.setdefault(self._key(span), []).append(span)
        if not groups:
            return []
        key = None
        if len(groups) > 1:
            waits = [(key, span.waited) for key, spans in groups.items() for span in spans]
            key = overdue(waits, self._settings.max_wait)
            if key is None:
                key = self._policy.choose({key: _summarise(spans) for key, spans in groups.items()})
        else:
            (key,) = groups
        # Tokens that are decoded come before pieces of prompts, which can be cut to the room that is left.
        spans = sorted(groups[key], key=lambda span: (span.length > 1, -span.waited, span.sequence.admitted))
        room, chosen = self._settings.chunk, []
        for span in spans:
            if span.length > room:
                if self._flat and room and span.stream is None and not span.sequence.drafts:
                    span.length, span.asks = room, 0
                elif chosen:
                    continue
            chosen.append(span)
            room = max(0, room - span.length)
            if not room:
                break
        return chosen

    def _with_pages(self, spans: list[Span]) -> list[Span]:
        """Reserves pages for the tokens of spans that begin; sequences that came last give way where there are none."""
        held: list[Span] = []
        for span in sorted(spans, key=lambda span: span.sequence.admitted):
            sequence = span.sequence
            if sequence.span is not span:
                continue  # it gave way to an earlier one
            if span.stream is None:
                while sequence.row >= 0 and not self._pools.reserve(sequence.row, span.start + span.length):
                    share = self._pools.share(sequence.row)
                    rivals = [each for each in self.running.values() if self._pools.share(each.row) == share]
                    self._give_way(max(rivals, key=lambda each: each.admitted))
            if sequence.row >= 0:
                held.append(span)
        return [span for span in held if span.sequence.row >= 0]

    def _give_way(self, sequence: Sequence) -> None:
        """Takes row and pages from a sequence and puts it at the front of the queue."""
        self.num_preemptions += 1
        if self._settings.preemption == "copy":
            sequence.saved = self._pools.copy_out(sequence.row)
            self._leave(sequence)
        else:
            self._leave(sequence)
            sequence.forget()
        self.queue.appendleft(sequence)


def _summarise(spans: list[Span]) -> Ready:
    segments = {span.segment.depths.start for span in spans}
    return Ready(
        sum(span.length for span in spans),
        len(spans),
        max(span.waited for span in spans),
        any(span.place == len(span.sequence.passes.segments) - 1 for span in spans),
        0 in segments,
    )
