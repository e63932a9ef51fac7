"""Settings of the choice and number of new tokens."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from refold.errors import RefoldError
from refold.generation.constraint import Constraint
from refold.suggest import MAX_NUMBER, shorten

DEFAULT_NEW_TOKENS = 128
MAX_STOPS = 16
"""Most stop strings of one request."""
MAX_LOGPROBS = 20
"""Most alternatives for each new token."""
MAX_CHOICES = 128
"""Most continuations of one prompt."""
_OPTIONAL_NUMBERS = ("max_new_tokens", "exit_depth", "logprobs", "prompt_logprobs")
MAX_BIAS = 100.0
"""Largest number that is added to a logit."""


@dataclass(frozen=True)
class Sampling:
    """Settings of one generation.

    With penalties, a new token is chosen from changed logits z, in this order: `logit_bias` is added; the logits of
    tokens in the prompt or among the new tokens are divided by `repetition_penalty` if positive, else multiplied (CTRL,
    arXiv 1909.05858, section 4.1); `frequency_penalty` times the number of occurrences among the new tokens is
    subtracted, and `presence_penalty` once if there is any. Then follow temperature, top_k, top_p and min_p.

    Attributes:
        max_new_tokens: Maximal number of new tokens; None: 128, or the number that fits into the model's positions;
            0 only with `prompt_logprobs`.
        temperature: 0 takes the likeliest token (greedy); otherwise logits are divided by it and a token is drawn.
        top_p: Draw from the likeliest tokens whose probabilities sum to this.
        top_k: Draw from this number of likeliest tokens; 0: from all.
        seed: Seed of the draws.
        exit_depth: Number of depths of a folded model to run; None: all.
        min_p: Draw from the tokens whose probability is at least this share of the likeliest one's.
        stop: Strings that end the text; one string, or several. The text ends before the string.
        repetition_penalty: Above 1 tokens of the prompt and of the new text become less likely; 1: off.
        presence_penalty: Subtracted from the logits of tokens that the new text has; -2 to 2.
        frequency_penalty: Subtracted from a token's logit for each occurrence in the new text; -2 to 2.
        logit_bias: Number to add to the logit of a token, -100 to 100, by token id.
        logprobs: Return the log-probability of each new token and of this number of likeliest tokens; None: neither.
        n: Number of continuations of the prompt.
        ignore_eos: Go on after an end token, which is then a token like others.
        exit_tolerance: Take the exits calibrated for this tolerance; 0: run the full depth; None: the engine's own
            rule. The largest calibrated tolerance that is not above it is taken; below all of them, the full depth.
        prompt_logprobs: Return the log-probability of each token of the prompt and of this number of likeliest tokens;
            None: neither. The prompt, and the first new token, run the full depth or `exit_depth` then.
        constraint: The form that the text must have; None: any.

    Raises:
        RefoldError: A setting is of another type or out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    exit_depth: int | None = None
    min_p: float = 0.0
    stop: str | Sequence[str] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    n: int = 1
    ignore_eos: bool = False
    exit_tolerance: float | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        # Frozen: this is the only place that sets fields, to their checked forms, which can be hashed.
        self._read_numbers()
        least = 1 if self.prompt_logprobs is None else 0
        if self.max_new_tokens is not None and self.max_new_tokens < least:
            raise RefoldError(f"max_new_tokens: at least {least} is required (got {self.max_new_tokens})")
        if not 0 <= self.temperature < math.inf:
            raise RefoldError(f"temperature: 0 (greedy) or more is required (got {self.temperature})")
        if not 0 < self.top_p <= 1:
            raise RefoldError(f"top_p: must be above 0 and at most 1 (got {self.top_p})")
        if self.top_k < 0:
            raise RefoldError(f"top_k: 0 (all tokens) or more is required (got {self.top_k})")
        if not 0 <= self.seed <= MAX_NUMBER:
            raise RefoldError(f"seed: 0 to 2^63 - 1 is required (got {shorten(self.seed)})")
        if not 0 <= self.min_p <= 1:
            raise RefoldError(f"min_p: must be at least 0 and at most 1 (got {self.min_p})")
        if not 0 < self.repetition_penalty < math.inf:
            raise RefoldError(f"repetition_penalty: must be above 0, and 1 is off (got {self.repetition_penalty})")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise RefoldError(f"{name}: must lie in -2..2 (got {getattr(self, name)})")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                raise RefoldError(f"{name}: must lie in 0..{MAX_LOGPROBS}, or be None (got {value})")
        if not 1 <= self.n <= MAX_CHOICES:
            raise RefoldError(f"n: must lie in 1..{MAX_CHOICES} (got {self.n})")
        self._check_exits()
        self._read_constraint()
        object.__setattr__(self, "stop", _read_stops(self.stop))
        object.__setattr__(self, "logit_bias", _read_bias(self.logit_bias))

    @property
    def has_penalties(self) -> bool:
        """Whether the choice of a token depends on the tokens before it other than through the model."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def biases(self) -> dict[int, float]:
        """The numbers of `logit_bias` by token."""
        return dict(self.logit_bias)

    def _read_constraint(self) -> None:
        if isinstance(self.constraint, Mapping):
            object.__setattr__(self, "constraint", Constraint.read(self.constraint))
        if self.constraint is not None and self.ignore_eos:
            raise RefoldError("constraint: no ignore_eos is required beside it, because the end token ends the form")

    def _check_exits(self) -> None:
        tolerance = self.exit_tolerance
        if tolerance is None:
            return
        if not _is_real(tolerance):
            raise RefoldError(f"exit_tolerance: a number is required (got {shorten(tolerance)})")
        if not 0 <= tolerance < 1:
            raise RefoldError(f"exit_tolerance: must be at least 0 and below 1, and 0 is full depth (got {tolerance})")
        if self.exit_depth is not None:
            raise RefoldError(f"exit_tolerance: no exit_depth is required beside it (got exit_depth {self.exit_depth})")
        object.__setattr__(self, "exit_tolerance", float(tolerance))

    def _read_numbers(self) -> None:
        for name in ("top_k", "seed", "n", *_OPTIONAL_NUMBERS):
            value, is_optional = getattr(self, name), name in _OPTIONAL_NUMBERS
            if not _is_whole(value) and not (is_optional and value is None):
                raise RefoldError(f"{name}: a whole number is required (got {shorten(value)})")
            if value is not None and value > MAX_NUMBER and name != "seed":
                raise RefoldError(f"{name}: must be at most {MAX_NUMBER} (got {shorten(value)})")
        for name in (
            *("temperature", "top_p", "min_p"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty"),
        ):
            if not _is_real(value := getattr(self, name)):
                raise RefoldError(f"{name}: a number is required (got {shorten(value)})")
            object.__setattr__(self, name, float(value))
        if not isinstance(self.ignore_eos, bool):
            raise RefoldError(f"ignore_eos: true or false is required (got {shorten(self.ignore_eos)})")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    if _is_whole(value):
        # A larger one may have no float.
        return abs(value) <= MAX_NUMBER
    return isinstance(value, Real) and not isinstance(value, bool)


def _read_stops(given: Any) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else given
    if not isinstance(stops, Sequence) or not all(isinstance(each, str) for each in stops):
        raise RefoldError(f"stop: a string or a list of strings is required (got {shorten(given)})")
    if not all(stops):
        raise RefoldError(f"stop: strings with at least one character are required (got {shorten(given)})")
    if len(stops) > MAX_STOPS:
        raise RefoldError(f"stop: must be at most {MAX_STOPS} strings (got {len(stops)})")
    return tuple(dict.fromkeys(stops))


def _read_bias(given: Any) -> tuple[tuple[int, float], ...]:
    try:
        entries = dict(given)
    except (TypeError, ValueError):
        raise RefoldError(f"logit_bias: numbers by token id are required (got {shorten(given)})") from None
    for token, number in entries.items():
        if not _is_whole(token) or token < 0:
            raise RefoldError(f"logit_bias: token ids of 0 or more are required (got {shorten(token)})")
        if not _is_real(number) or not abs(number) <= MAX_BIAS:
            raise RefoldError(
                f"logit_bias: a number in -{MAX_BIAS:.0f}..{MAX_BIAS:.0f} is required for token {token} "
                f"(got {shorten(number)})"
            )
    return tuple(sorted((token, float(number)) for token, number in entries.items()))
