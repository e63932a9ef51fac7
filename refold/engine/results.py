"""Results of requests: the text and tokens of a choice, and how each token was made."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Reason = Literal["stop", "length", "cancelled", "error"]
"""Why a choice ended: an end token or a stop string, its number of tokens, the caller, or a fault."""


class TokenLogprob(NamedTuple):
    """The log-probability of one token.

    Attributes:
        token: Token id.
        logprob: Natural logarithm of its probability under the model, before sampling settings.
    """

    token: int
    logprob: float


class PromptLogprob(NamedTuple):
    """The log-probability of one token of a prompt, given the tokens before it.

    Attributes:
        token: Token id.
        logprob: Its log-probability.
        alternatives: The likeliest tokens at its place, likeliest first.
    """

    token: int
    logprob: float
    alternatives: tuple[TokenLogprob, ...]


class NewToken(NamedTuple):
    """One new token as it comes.

    Attributes:
        token: Token id.
        depth: Number of depths that computed it.
        logprob: Its log-probability; None where none was asked for.
        alternatives: The likeliest tokens, likeliest first; None where none were asked for.
    """

    token: int
    depth: int
    logprob: float | None = None
    alternatives: tuple[TokenLogprob, ...] | None = None


class Piece(NamedTuple):
    """The step of a choice: a new token with the text that it makes certain, or the end.

    The pieces of a choice have its tokens in order, those of a stop string included, and their texts join to its text.
    The last piece has the reason, also of a choice that never began.

    Attributes:
        choice: Number of the choice.
        text: Whole characters, never a part of a stop string; a token within a character adds none.
        token: The new token; None at an end by an end token, and where the choice was ended from outside.
        reason: Why the choice has ended; None while it goes on.
        error: The fault in one sentence, where that is the reason.
    """

    choice: int
    text: str
    token: NewToken | None = None
    reason: Reason | None = None
    error: str | None = None

    @property
    def is_last(self) -> bool:
        """Whether the choice has ended."""
        return self.reason is not None


@dataclass(frozen=True)
class Continuation:
    """One continuation of a prompt.

    Attributes:
        text: The new text, without end tokens and without the stop string.
        token_ids: New tokens, with those of a stop string; an end token is not among them.
        depths: For each new token the number of depths that computed it.
        reason: Why it ended.
        stop: The stop string or the end token it ended with; None otherwise.
        logprobs: Of each new token; None where none were asked for.
        alternatives: For each new token the likeliest tokens, likeliest first; None where none were asked for.
        ties: Places of new tokens at which the two likeliest logits were less than 1e-4 apart.
        error: The fault in one sentence; None otherwise.
    """

    text: str
    token_ids: tuple[int, ...]
    depths: tuple[int, ...]
    reason: Reason
    stop: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    alternatives: tuple[tuple[TokenLogprob, ...], ...] | None = None
    ties: tuple[int, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Result:
    """A finished request.

    Attributes:
        index: Its place among the prompts of the call, or its number.
        prompt_ids: Tokens of the prompt.
        choices: `n` continuations.
        cached_tokens: Tokens of the prompt that earlier prompts had computed.
        seconds: Times since the request came: `first_token` and `finished`; `queued` until its first launch.
        prompt_logprobs: Of each token of the prompt, None for the first, as many as were read before a cancel; None
            where none were asked for.
    """

    index: int
    prompt_ids: tuple[int, ...]
    choices: tuple[Continuation, ...]
    cached_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    prompt_logprobs: tuple[PromptLogprob | None, ...] | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text
