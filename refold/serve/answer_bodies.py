"""Bodies of answers, as the OpenAPI document tells them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Told(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorDetail(_Told):
    """What is wrong."""

    message: str
    """`field: what is required (what was given)`."""
    type: str
    param: str | None
    """The field at fault."""
    code: str | None
    """A name that programs can compare."""


class ErrorAnswer(_Told):
    """The answer to a request that fails."""

    error: ErrorDetail


class CachedDetail(_Told):
    """Of the tokens of prompts."""

    cached_tokens: int
    """Those that earlier prompts had computed."""


class UsageAnswer(_Told):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedDetail


class AlternativeToken(_Told):
    """A likely token."""

    id: int
    text: str
    logprob: float


class ToldToken(_Told):
    """A token of a choice; text that belongs to no new token has neither id nor depth."""

    id: int | None
    text: str
    depth: int | None
    """Number of depths that computed it."""
    logprob: float | None = None
    alternatives: list[AlternativeToken] = []


class CompletionLogprobs(_Told):
    """Log-probabilities, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Characters of the choice's text before the token."""


class CompletionChoice(_Told):
    """One continuation of a prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    refold_tokens: list[ToldToken] | None = None


class _Whole(_Told):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageAnswer


class CompletionAnswer(_Whole):
    """Continuations of prompts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ToldLogprob(_Told):
    """The log-probability of a token."""

    token: str
    logprob: float | None
    bytes: list[int]


class ChatLogprob(ToldLogprob):
    """The log-probability of a token of the answer."""

    top_logprobs: list[ToldLogprob]


class ChatLogprobs(_Told):
    """Log-probabilities of the tokens of the answer."""

    content: list[ChatLogprob]
    refusal: None


class CalledFunction(_Told):
    """A function and its arguments."""

    name: str
    arguments: str
    """JSON, if the model keeps to it."""


class AnsweredCall(_Told):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnsweredMessage(_Told):
    """A message of the model."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnsweredCall] | None = None


class ChatChoice(_Told):
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


class ModelCard(_Told):
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


class ModelList(_Told):
    """The served models."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeAnswer(_Told):
    """Tokens of a prompt."""

    tokens: list[int]
    texts: list[str]
    count: int
    max_model_len: int


class DetokenizeAnswer(_Told):
    """Text of tokens."""

    prompt: str


class HealthAnswer(_Told):
    """The server works."""

    status: Literal["ok"]


class VersionAnswer(_Told):
    """The version of the server."""

    version: str


class StateAnswer(_Told):
    """What a page about the server shows."""

    models: list[dict[str, Any]]
    engines: dict[str, dict[str, Any]]
