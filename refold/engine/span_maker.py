"""The next span of a sequence."""

from collections.abc import Sequence as Items

from refold.engine.drafts import Drafter
from refold.engine.pools import Pools
from refold.engine.sequence import Sequence, Span
from refold.engine.settings import EngineSettings


class SpanMaker:
    """Makes the next span of a sequence: tokens that have not run, as many as a launch can take.

    Args:
        pools: Keep states before tokens that are guessed.
        settings: Of the engine.
        drafter: Looks guesses up; None: nothing is guessed.
        recurrent: Depths that keep a state.
    """

    def __init__(self, pools: Pools, settings: EngineSettings, drafter: Drafter | None, recurrent: Items[int]):
        self._pools, self._settings, self._drafter = pools, settings, drafter
        self._recurrent = tuple(recurrent)

    def begin(self, sequence: Sequence) -> None:
        """Gives a sequence its next span."""
        start, known = sequence.num_run, len(sequence.tokens)
        if start >= known:
            # A guess from early depths: it runs them too, and makes the next guess.
            sequence.span = Span(sequence, start, 1, 1)
            return
        drafts_early = self._drafter is not None and bool(self._drafter.depth)
        if self._drafter is not None and known - start == 1 and not sequence.drafts:
            self._drafter.look_up(sequence)
        guesses = 0 if drafts_early else len(sequence.drafts)
        length = self._cut_at_page(sequence, start, min(known - start, self._settings.chunk))
        asks = 1 if start + length >= known else 0
        if guesses or (drafts_early and asks and length == 1):
            self._keep_states(sequence)
        if guesses:
            length, asks = 1 + guesses, 1 + guesses
        sequence.span = Span(sequence, start, length, asks, sequence.scores_prompt)

    def publish(self, sequence: Sequence) -> None:
        """Offers the prompt's pages to later sequences, once all depths have run its tokens."""
        if not self._settings.share_prefixes or sequence.waiting or sequence.request.sampling.exit_depth is not None:
            return
        done = min(sequence.num_run, sequence.num_prompt)
        at_border = done == sequence.num_run and done % self._settings.page_size == 0
        if not self._recurrent or at_border:
            self._pools.publish(sequence.row, sequence.request.prompt_ids, done, sequence.adapters_number)

    def _cut_at_page(self, sequence: Sequence, start: int, length: int) -> int:
        """Returns a length with which a prompt's span ends at its last page border, where states can be shared."""
        if not self._recurrent or not self._settings.share_prefixes:
            return length
        page = self._settings.page_size
        border = (sequence.num_prompt - 1) // page * page
        return min(length, border - start) if start < border else length

    def _keep_states(self, sequence: Sequence) -> None:
        if self._recurrent and sequence.snapshot is None:
            sequence.snapshot = self._pools.save_states(sequence.row, self._recurrent)
