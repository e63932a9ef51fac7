"""Requests, the sequences that answer them, and the spans of tokens of a sequence that are on their way."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from refold.blueprint.passes import Passes, PassSegment
from refold.engine.results import Continuation, NewToken, Piece, PromptLogprob, Result, TokenLogprob
from refold.generation.sampling import Sampling
from refold.modeling.adapters import AdapterSet

if TYPE_CHECKING:
    from refold.engine.exits import ExitRule
    from refold.engine.grammars import Grammar
    from refold.engine.pools import Saved
    from refold.engine.states import Snapshot
    from refold.engine.stops import ChoiceText


@dataclass(eq=False)
class Request:
    """A prompt with its settings, answered by `sampling.n` sequences.

    Attributes:
        index: Its number, or its place among the prompts of a call.
        prompt_ids: Tokens, at least one.
        sampling: Settings.
        max_new_tokens: Maximal number of new tokens, resolved against the context.
        forced: Tokens that the sequence goes on with whatever is predicted; None: predictions.
        exits: Rule by which its tokens leave; None: they run the full depth.
        grammar: Compiled constraint; None: any text.
        listener: Called with every new token of every choice, and with every end.
        adapters: That it runs with; None: the model's own.
        siblings: Choices that begin after the first token of the first one, whose prompt's pages they share.
        came: Time it came, in seconds.
        begun: Time of its first launch.
        told: Time of its first token.
        choices: Finished choices by number.
        predicted: Number of a choice to the predictions along forced tokens.
        cached_tokens: Tokens of the prompt that were in memory already.
        prompt_logprobs: Log-probabilities of the prompt's tokens from the second on, as far as they are known.
    """

    index: int
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    max_new_tokens: int
    forced: tuple[int, ...] | None = None
    exits: "ExitRule | None" = None
    grammar: "Grammar | None" = None
    listener: Callable[[Piece], None] | None = None
    adapters: AdapterSet | None = None
    siblings: "list[Sequence]" = field(default_factory=list)
    came: float = field(default_factory=time.perf_counter)
    begun: float | None = None
    told: float | None = None
    choices: dict[int, Continuation] = field(default_factory=dict)
    predicted: dict[int, list[int]] = field(default_factory=dict)
    cached_tokens: int = 0
    prompt_logprobs: list[PromptLogprob] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """Whether all sequences have ended."""
        return len(self.choices) == self.sampling.n

    def result(self) -> Result:
        """Returns the result of a finished request."""
        seconds = {"finished": time.perf_counter() - self.came}
        if self.begun is not None:
            seconds["queued"] = self.begun - self.came
        if self.told is not None:
            seconds["first_token"] = self.told - self.came
        choices = tuple(self.choices[number] for number in range(self.sampling.n))
        prompt = None if self.sampling.prompt_logprobs is None else (None, *self.prompt_logprobs)
        return Result(self.index, self.prompt_ids, choices, self.cached_tokens, seconds, prompt)


@dataclass(eq=False)
class Span:
    """Neighbouring tokens of one sequence that run the stack together.

    Attributes:
        sequence: Their sequence.
        start: Position of the first token.
        length: Number of tokens.
        asks: Number of last tokens whose predictions choose new tokens; 0: none is chosen.
        scores: Whether the prediction behind each of its tokens scores the next token of the prompt.
        place: Index of the next segment.
        stream: `[length, D]`, the residual stream before that segment; None before the first.
        previous: The likeliest token of the last exit that was looked at, for the measure `agreement`.
        waited: Launches since it became ready.
    """

    sequence: "Sequence"
    start: int
    length: int
    asks: int
    scores: bool = False
    place: int = 0
    stream: Tensor | None = None
    previous: int = -1
    waited: int = 0

    @property
    def segment(self) -> PassSegment:
        """The next segment."""
        return self.sequence.passes.segments[self.place]

    @property
    def wanted(self) -> int:
        """Number of last tokens whose predictions are wanted; 0: the span only fills the memory."""
        return self.length if self.scores else self.asks

    @property
    def is_through(self) -> bool:
        """Whether no segment is left."""
        return self.place == len(self.sequence.passes.segments)


@dataclass(eq=False)
class Sequence:
    """One continuation of a prompt.

    Attributes:
        request: Its request.
        number: Which of the request's choices.
        passes: Segments it runs.
        text: Collects its text and knows its end.
        tokens: Prompt and new tokens.
        row: Its row in the pools; -1: none.
        num_run: Tokens that have begun to run.
        depths: For each new token the number of depths that computed it.
        waiting: Index of a segment to the streams that wait before it, and the position of their first token.
        drafts: Drafted tokens after the last certain one.
        draft_probs: Distribution each of them was drawn from; None: likeliest token, or looked up.
        span: The span that is on its way; None: none.
        snapshot: States before the first drafted token, where mixers keep some.
        logprobs: Of new tokens, where asked for.
        alternatives: Likewise.
        ties: Places of new tokens whose two likeliest logits nearly tie.
        admitted: Number of its admission; later ones give way first.
        saved: Copy of its memory while it gives way.
    """

    request: Request
    number: int
    passes: Passes
    text: "ChoiceText"
    tokens: list[int]
    row: int = -1
    num_run: int = 0
    depths: list[int] = field(default_factory=list)
    waiting: dict[int, tuple[list[Tensor], int]] = field(default_factory=dict)
    drafts: list[int] = field(default_factory=list)
    draft_probs: list[Tensor] | None = None
    span: Span | None = None
    snapshot: "Snapshot | None" = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    alternatives: list[tuple[TokenLogprob, ...]] = field(default_factory=list)
    ties: list[int] = field(default_factory=list)
    admitted: int = -1
    saved: "Saved | None" = None

    @property
    def num_prompt(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def adapters_number(self) -> int:
        """Number of the adapters it runs with; 0: the model's own."""
        return 0 if self.request.adapters is None else self.request.adapters.number

    @property
    def num_new(self) -> int:
        """Number of new tokens so far."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are still to be computed, which needs all its tokens to run."""
        request = self.request
        is_asked = request.sampling.prompt_logprobs is not None and self.number == 0
        return is_asked and len(request.prompt_logprobs) < self.num_prompt - 1

    @property
    def num_waiting(self) -> int:
        """Number of tokens whose deeper depths have not run."""
        return sum(len(stream) for streams, _ in self.waiting.values() for stream in streams)

    def ids(self, start: int, length: int) -> list[int]:
        """Returns the tokens of a span; drafted ones follow the certain ones."""
        known = self.tokens[start : start + length]
        if len(known) < length:
            first = start + len(known) - len(self.tokens)
            known = known + self.drafts[first : first + length - len(known)]
        return known

    def wait(self, span: Span, stream: Tensor) -> None:
        """Lets the stream of a span wait before the span's next segment, behind those that wait there already."""
        streams, start = self.waiting.get(span.place, ([], span.start))
        self.waiting[span.place] = ([*streams, stream], start)

    def keep_logprobs(self, logprob: TokenLogprob | None, alternatives: Items[TokenLogprob] | None) -> None:
        """Keeps the log-probability of a new token and its alternatives; None where they were not asked for."""
        if logprob is not None:
            self.logprobs.append(logprob)
        if alternatives is not None:
            self.alternatives.append(tuple(alternatives))

    def tell(self, token: int | None = None, error: str | None = None) -> Piece:
        """Returns what the newest token adds to the text; None: what an end from outside adds.

        Args:
            token: The token.
            error: The fault that ends the choice, in one sentence.
        """
        text = self.text
        made = None
        if token is not None and len(text.token_ids) == self.num_new:
            place = self.num_new - 1
            logprob = self.logprobs[place].logprob if place < len(self.logprobs) else None
            alternatives = self.alternatives[place] if place < len(self.alternatives) else None
            made = NewToken(token, self.depths[place], logprob, alternatives)
        return Piece(self.number, text.take(), made, text.reason, error)

    def forget(self) -> None:
        """Drops everything that is on its way, because its memory is gone."""
        self.span, self.num_run, self.drafts, self.draft_probs, self.snapshot = None, 0, [], None, None
        self.waiting.clear()
