"""Bodies of answers, as the OpenAPI document tells them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class AnswerPart(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(AnswerPart):
    """A fault of a request or of the server."""

    message: str
    """`field: what is required (what was given)`."""
    type: str
    param: str | None
    """The field at fault."""
    code: str | None
    """A name that programs can compare."""


class ErrorAnswer(AnswerPart):
    """The answer to a request that fails."""

    error: ErrorDetail


class CachedDetail(AnswerPart):
    """Of the tokens of prompts."""

    cached_tokens: int
    """Those that earlier prompts had computed."""


class UsageAnswer(AnswerPart):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedDetail


class AlternativeToken(AnswerPart):
    """A likely token."""

    id: int
    text: str
    logprob: float


class ToldToken(AnswerPart):
    """A token of a choice; text that belongs to no new token has neither id nor depth."""

    id: int | None
    text: str
    depth: int | None
    """Number of depths that computed it."""
    logprob: float | None = None
    alternatives: list[AlternativeToken] = []


class CompletionLogprobs(AnswerPart):
    """Log-probabilities, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Characters of the choice's text before the token."""


class CompletionChoice(AnswerPart):
    """One continuation of a prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    refold_tokens: list[ToldToken] | None = None


class _Whole(AnswerPart):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageAnswer


class CompletionAnswer(_Whole):
    """Continuations of prompts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ToldLogprob(AnswerPart):
    """The log-probability of a token."""

    token: str
    logprob: float | None
    bytes: list[int]


class ChatLogprob(ToldLogprob):
    """The log-probability of a token of the answer."""

    top_logprobs: list[ToldLogprob]


class ChatLogprobs(AnswerPart):
    """Log-probabilities of the tokens of the answer."""

    content: list[ChatLogprob]
    refusal: None


class CalledFunction(AnswerPart):
    """A function and its arguments."""

    name: str
    arguments: str
    """JSON, if the model keeps to it."""


class AnsweredCall(AnswerPart):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnsweredMessage(AnswerPart):
    """A message of the model."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnsweredCall] | None = None


class ChatChoice(AnswerPart):
    """One answer."""

    index: int
    message: AnsweredMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    refold_tokens: list[ToldToken] | None = None


class ChatAnswer(_Whole):
    """Answers to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ModelCard(AnswerPart):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Most tokens of a prompt and its continuation."""
    parameters: int
    weight_bytes: int
    depths: int
    exit_depths: list[int]
    role: Literal["model", "adapters", "source"]


class ModelList(AnswerPart):
    """The served models."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeAnswer(AnswerPart):
    """Tokens of a prompt."""

    tokens: list[int]
    texts: list[str]
    count: int
    max_model_len: int


class DetokenizeAnswer(AnswerPart):
    """Text of tokens."""

    prompt: str


class HealthAnswer(AnswerPart):
    """The server works."""

    status: Literal["ok"]


class VersionAnswer(AnswerPart):
    """The version of the server."""

    version: str


class StateAnswer(AnswerPart):
    """The state of models and engines, which the playground shows."""

    models: list[dict[str, Any]]
    engines: dict[str, dict[str, Any]]
