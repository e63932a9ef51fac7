"""Continuous depth-wise batching: one launch after the other, and the fate of each span behind it."""

import time

import torch

from refold.blueprint.passes import Kinds, Passes, find_passes, last_writing_depth, recurrent_depths
from refold.engine.acceptance import Accepted
from refold.engine.choices import OpenChoices
from refold.engine.drafts import Drafter
from refold.engine.exits import LiveExits
from refold.engine.launch import Launch, Leaving, Rotations
from refold.engine.logprobs import PromptScorer
from refold.engine.policy import make_policy
from refold.engine.pools import Pools
from refold.engine.report import Statistics
from refold.engine.sampler import Sampler
from refold.engine.scheduler import Scheduler
from refold.engine.sequence import Request, Sequence, Span
from refold.engine.settings import EngineSettings, KvPolicy
from refold.engine.span_maker import SpanMaker
from refold.modeling.model import RefoldForCausalLM


class DepthBatcher:
    """Runs sequences in shared launches.

    Args:
        model: The model.
        pools: Its memory.
        sampler: Draws.
        settings: Of the engine.
        kv: Keys and values of skipped depths.
        exits: Takes exits; None: none is taken.
        drafter: Drafts; None: nothing is drafted.
    """

    def __init__(
        self,
        model: RefoldForCausalLM,
        pools: Pools,
        sampler: Sampler,
        settings: EngineSettings,
        kv: KvPolicy = "recompute",
        exits: LiveExits | None = None,
        drafter: Drafter | None = None,
    ):
        self._model, self._pools, self._sampler, self._settings = model, pools, sampler, settings
        self._kv, self._exits, self._drafter = kv, exits, drafter
        self._blueprint = model.config.read_blueprint()
        self._last_writing = last_writing_depth(self._blueprint)
        self._recurrent = recurrent_depths(self._blueprint)
        self._writing = [index for index in range(self._blueprint.num_depths) if self._blueprint.made_heads(index)]
        self.flat = not self._recurrent
        self._has_windows = any(depth.window is not None for depth in self._blueprint.depths)
        self.scheduler = Scheduler(pools, make_policy(settings.policy, settings.min_coda), settings, self.flat)
        self._rotations = Rotations(model)
        self._passes: dict[tuple[int | None, bool], Passes] = {}
        self._has_leaving = False
        self._kinds: Kinds = {}
        self._spans = SpanMaker(pools, settings, drafter, self._recurrent)
        self.statistics = Statistics()
        self._choices = OpenChoices(self.scheduler, sampler, self.statistics)
        self._prompts = PromptScorer(model)

    def passes(self, exit_depth: int | None = None, has_leaving: bool = True) -> Passes:
        """Returns the segments of sequences that run so many depths.

        Args:
            exit_depth: Number of depths; None: all.
            has_leaving: Whether any running sequence may leave at exits, where the engine takes them. Exits are cuts
                then whatever the settings, also for sequences that pass them, so that all share launches.
        """
        has_leaving &= self._exits is not None
        joins = self._settings.join_loops
        whole = not has_leaving and (self._drafter is None if joins is None else not joins)
        if (exit_depth, whole) not in self._passes:
            cut = None if self._drafter is None or not self._drafter.depth else self._drafter.depth
            self._passes[exit_depth, whole] = find_passes(self._blueprint, exit_depth, cut, self._kinds, whole)
        return self._passes[exit_depth, whole]

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not ended."""
        return self.scheduler.has_work or self._choices.has_finished

    @torch.inference_mode()
    def cancel(self, request: Request | None = None) -> None:
        """Ends the sequences of a request that have not ended; None: all sequences."""
        for sequence in (*self.scheduler.queue, *self.scheduler.running.values()):
            if request is None or sequence.request is request:
                self._choices.end(sequence, "cancelled")

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Runs one launch and returns the requests that have ended since the last step."""
        began = time.perf_counter()
        spent = self.statistics.model_seconds + self.statistics.sampling_seconds
        self._drop_lost()
        for sequence in self.scheduler.admit():
            request = sequence.request
            self._sampler.set(
                sequence.row, request.sampling, request.prompt_ids, sequence.number, grammar=request.grammar
            )
            for token in sequence.tokens[sequence.num_prompt :]:
                self._sampler.note(sequence.row, token)
            if request.begun is None:
                request.begun = time.perf_counter()
            if sequence.span is None:
                self._begin(sequence)
        self._has_leaving = any(each.request.exits is not None for each in self.scheduler.running.values())
        if spans := self.scheduler.pick():
            self._launch(spans)
            if self._drafter is not None:
                self._drafter.observe(self.statistics.new_tokens, len(self.scheduler.running))
        inside = self.statistics.model_seconds + self.statistics.sampling_seconds - spent
        self.statistics.other_seconds += time.perf_counter() - began - inside
        return self._choices.take_finished()

    def _begin(self, sequence: Sequence) -> None:
        """Gives a sequence its next span."""
        if not sequence.waiting:
            self._has_leaving |= sequence.request.exits is not None
            sequence.passes = self.passes(sequence.request.sampling.exit_depth, self._has_leaving)
        self._spans.begin(sequence)

    def _drop_lost(self) -> None:
        for sequence, error in self.scheduler.lose():
            self._choices.end(sequence, "error", error)

    def _launch(self, spans: list[Span]) -> None:
        """Runs spans for as many segments as all of them go on together."""
        for span in spans:
            if span.place == 0:
                span.sequence.num_run = span.start + span.length
        launch = Launch(self._model, self._pools, self._rotations, spans, self.flat)
        clock = time.perf_counter()
        while True:
            self.statistics.launches += 1
            self.statistics.launched_tokens += launch.num_tokens
            self.statistics.mixed_launches += len({span.place for span in launch.spans}) > 1
            launch.run()
            self._drop_lost()
            self.statistics.model_seconds += time.perf_counter() - clock
            going_on = self._after(launch)
            if not going_on or self.scheduler.has_others(launch.spans[0].segment.kind, launch.spans):
                break
            clock = time.perf_counter()
        for index, span in enumerate(launch.spans):
            if span.sequence.span is span and span.stream is None:
                span.stream = launch.stream(index)

    def _after(self, launch: Launch) -> bool:
        """Decides on every span behind a segment; says whether all of them go on as they are."""
        through, filled, at_exit, unchanged = [], [], [], True
        for index, span in enumerate(launch.spans):
            if span.sequence.span is not span:
                unchanged = False
                continue
            span.stream = None
            if span.is_through:
                (through if span.wanted else filled).append(index)
                unchanged = False
                continue
            behind = span.sequence.passes.segments[span.place - 1]
            if self._decides(span, behind.depths.stop):
                at_exit.append(index)
        for index in filled:
            self._filled(launch.spans[index])
        if at_exit:
            unchanged &= (
                self._drafting(launch, at_exit) if self._drafter is not None else self._exiting(launch, at_exit)
            )
        if through:
            self._predict(launch, through)
        for index, span in enumerate(launch.spans):
            if span.sequence.span is not span or span.is_through:
                unchanged = False
                continue
            if span.stream is None:
                unchanged &= self._go_on(launch, index, span)
        kinds = {span.segment.kind for span in launch.spans if span.sequence.span is span and not span.is_through}
        return unchanged and len(kinds) == 1

    def _decides(self, span: Span, depth: int) -> bool:
        if span.asks != 1 or span.scores:
            return False
        if self._drafter is not None:
            return depth == self._drafter.depth and span.length == 1
        if self._exits is None or not self._exits.looks_at(span.sequence.request.exits, depth):
            return False
        if self._kv == "propagate":
            # The keys of a prompt are exact: thresholds are measured so.
            return span.length == 1
        return self._kv != "recompute" or span.sequence.num_waiting + span.length <= self._settings.max_pending

    def _go_on(self, launch: Launch, index: int, span: Span) -> bool:
        """Joins waiting streams to a span that goes deeper, and drops tokens that need not; says if it is unchanged."""
        sequence = span.sequence
        if span.wanted == 0 and span.segment.depths.start > self._last_writing:
            self._filled(span)
            return False
        joined = sequence.waiting.pop(span.place, None)
        if joined is not None:
            streams, start = joined
            span.stream = torch.cat([*streams, launch.stream(index)])
            span.start, span.length = start, len(span.stream)
            return False
        if span.length > span.wanted and span.segment.depths.start > self._last_writing:
            span.stream = launch.stream(index)[-span.asks :]
            span.start, span.length = span.start + span.length - span.asks, span.asks
            return False
        return True

    def _filled(self, span: Span) -> None:
        """Ends a span that nobody asked a prediction of."""
        sequence = span.sequence
        sequence.span = None
        self._spans.publish(sequence)
        self._pass_window(sequence)
        self._begin(sequence)

    def _pass_window(self, sequence: Sequence) -> None:
        """Gives back the pages behind windows that no token reaches any more."""
        if self._has_windows:
            # Tokens that wait still run the deeper depths, with the windows of their own places.
            waiting = (start for _, start in sequence.waiting.values())
            self._pools.pass_window(sequence.row, min([sequence.num_run, *waiting]))

    def _exiting(self, launch: Launch, indices: list[int]) -> bool:
        """Lets rows leave at exits; says whether none did."""
        assert self._exits is not None
        stayed = True
        for leaving in launch.asked(indices):
            clock = time.perf_counter()
            decided = self._exits.decide(leaving)
            self.statistics.model_seconds += time.perf_counter() - clock
            if decided.logits is None:
                continue
            stayed = False
            left = [span for span, leaves in zip(leaving.spans, decided.leaves, strict=True) if leaves]
            self._skip(launch, left, leaving.depth)
            self._take(Leaving(leaving.depth, left, decided.logits), decided.logits)
        return stayed

    def _skip(self, launch: Launch, spans: list[Span], depth: int) -> None:
        """Sees to the keys and values of the depths that rows skip."""
        if self._kv == "shared":
            return
        place = {id(span): index for index, span in enumerate(launch.spans)}
        for span in spans:
            span.stream = launch.stream(place[id(span)])
        if self._kv == "recompute":
            for span in spans:
                assert span.stream is not None
                span.sequence.wait(span, span.stream)
            return
        clock = time.perf_counter()
        skipped = Launch(self._model, self._pools, self._rotations, spans, self.flat)
        skipped.fill([index for index in self._writing if index >= depth])
        self.statistics.model_seconds += time.perf_counter() - clock

    def _drafting(self, launch: Launch, indices: list[int]) -> bool:
        """Lets rows guess their next token behind the drafting depth; says whether none did."""
        assert self._drafter is not None
        wanted = self._drafter.num_wanted()
        guessing = []
        for index in indices:
            span = launch.spans[index]
            sequence = span.sequence
            room = sequence.request.max_new_tokens - sequence.num_new - 1
            if self._drafter.allows(sequence) and len(sequence.drafts) < min(wanted, room):
                guessing.append(index)
            elif sequence.drafts:
                # The span that goes on holds all of them, and asks for one prediction more than there are guesses.
                span.asks = len(sequence.drafts) + 1
        if not guessing:
            return True
        clock = time.perf_counter()
        for leaving in launch.asked(guessing):
            self._drafter.guess(leaving)
        self.statistics.model_seconds += time.perf_counter() - clock
        for index in guessing:
            launch.spans[index].sequence.wait(launch.spans[index], launch.stream(index))
            self._begin(launch.spans[index].sequence)
        return False

    def _predict(self, launch: Launch, indices: list[int]) -> None:
        """Takes the predictions of spans that have run all their segments."""
        for found in launch.asked(indices):
            clock = time.perf_counter()
            leaving = self._score(found)
            if not leaving.spans:
                continue
            logits = self._model.logits_after(leaving.depth, leaving.streams)
            self.statistics.model_seconds += time.perf_counter() - clock
            for span in leaving.spans:
                self._spans.publish(span.sequence)
            if all(span.asks == 1 for span in leaving.spans):
                self._take(leaving, logits)
            else:
                self._verify(leaving, logits)

    def _score(self, leaving: Leaving) -> Leaving:
        """Keeps log-probabilities of prompts, and returns the spans that go on to choose tokens."""
        if all(not span.scores and span.sequence.request.max_new_tokens for span in leaving.spans):
            return leaving
        going_on, streams = [], [leaving.streams[:0]]
        parts = leaving.streams.split([span.wanted for span in leaving.spans])
        for span, stream in zip(leaving.spans, parts, strict=True):
            if span.scores and not self._prompts.score(span, stream, leaving.depth):
                self._choices.end(span.sequence, "error", _NOT_FINITE_PROMPT)
            elif not span.asks:
                self._filled(span)
            elif not span.sequence.request.max_new_tokens:
                self._choices.end(span.sequence, "length")
            else:
                going_on.append(span)
                streams.append(stream[-span.asks :])
        return Leaving(leaving.depth, going_on, torch.cat(streams))

    def _take(self, leaving: Leaving, logits: torch.Tensor) -> None:
        """Draws one token for each row."""
        clock = time.perf_counter()
        sequences = [span.sequence for span in leaving.spans]
        chosen = self._sampler.choose(logits, [each.row for each in sequences], [each.num_new for each in sequences])
        self.statistics.sampling_seconds += time.perf_counter() - clock
        for index, sequence in enumerate(sequences):
            sequence.span = sequence.snapshot = None
            if not chosen.finite[index]:
                # A constraint that cannot go on allows no token at all.
                fault = self._sampler.fault(sequence.row) or _NOT_FINITE.format(sequence.num_new)
                self._choices.end(sequence, "error", fault)
                continue
            sequence.keep_logprobs(chosen.logprobs[index], chosen.alternatives[index])
            if self._accept(sequence, chosen.tokens[index], leaving.depth, chosen.gaps[index]):
                self._begin(sequence)

    def _verify(self, leaving: Leaving, logits: torch.Tensor) -> None:
        """Accepts guesses as far as the whole stack agrees, and the next token; rows without guesses draw one."""
        assert self._drafter is not None
        clock = time.perf_counter()
        rows = logits.split([span.asks for span in leaving.spans])
        plain = [(span, row) for span, row in zip(leaving.spans, rows, strict=True) if span.asks == 1]
        guessed = [(span, row) for span, row in zip(leaving.spans, rows, strict=True) if span.asks > 1]
        verdicts = self._drafter.verify(guessed)
        self.statistics.sampling_seconds += time.perf_counter() - clock
        for span, accepted, index in verdicts:
            self._accept_all(span, accepted, index, leaving.depth)
        if plain:
            found = torch.cat([row for _, row in plain])
            self._take(Leaving(leaving.depth, [span for span, _ in plain], found), found)

    def _accept_all(self, span: Span, accepted: Accepted, index: int, depth: int) -> None:
        sequence = span.sequence
        sequence.span = None
        if not accepted.finite[index]:
            self._choices.end(sequence, "error", _NOT_FINITE.format(sequence.num_new))
            return
        guessed = len(sequence.drafts)
        sequence.drafts, sequence.draft_probs = [], None
        for place, token in enumerate(accepted.tokens[index]):
            sequence.keep_logprobs(accepted.logprobs[index][place], accepted.alternatives[index][place])
            if not self._accept(sequence, token, depth, accepted.gaps[index][place]):
                return
        if accepted.counts[index] < guessed and self._recurrent:
            # Recurrent states cannot be taken back: those from before are restored, and certain tokens run again.
            assert sequence.snapshot is not None
            self._pools.restore_states(sequence.row, sequence.snapshot)
            sequence.num_run = span.start
        else:
            sequence.num_run = len(sequence.tokens) - 1
        sequence.snapshot = None
        self._begin(sequence)

    def _accept(self, sequence: Sequence, token: int, depth: int, gap: float) -> bool:
        """Appends a token; says whether the sequence goes on."""
        goes_on = self._choices.accept(sequence, token, depth, gap)
        if goes_on and len(sequence.tokens) % self._settings.page_size == 0:
            self._pass_window(sequence)
        return goes_on


_NOT_FINITE = "finite predictions are required (got NaN or infinity for new token {}); try weights in float32"
_NOT_FINITE_PROMPT = "finite predictions are required (got NaN or infinity in the prompt); try weights in float32"
