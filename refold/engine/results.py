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


@dataclass(frozen=True)
class Continuation:
    """One continuation of a prompt.

    Attributes:
        text: The new text, without end tokens and without the stop string.
        token_ids: New tokens; an end token is not among them.
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
    """

    index: int
    prompt_ids: tuple[int, ...]
    choices: tuple[Continuation, ...]
    cached_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text
