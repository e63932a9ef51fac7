"""Bodies of requests, with the bounds of every field."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from refold.generation.sampling import MAX_BIAS, MAX_CHOICES, MAX_LOGPROBS, MAX_STOPS
from refold.serve.chat_messages import ChatMessage, RequestPart
from refold.serve.tool_bodies import MAX_TOOLS, ResponseFormat, StructuredOutputs, Tool, ToolChoice
from refold.suggest import MAX_NUMBER, shorten

MAX_PROMPTS = 128
"""Most prompts of one request."""
MAX_BIASES = 1024
"""Most tokens of a `logit_bias`."""


def _read_whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53 else value


def _check_prompt(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"must be text, token ids, or a list of texts or of token ids (got {shorten(value)})")
    kinds = {type(each) for each in value}
    if kinds <= {int, float}:
        return _read_tokens(value, "entry")
    if kinds not in ({str}, {list}):
        raise ValueError(
            f"entries must all be texts, all be token ids, or all be lists of token ids (got {shorten(value)})"
        )
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"must be at most {MAX_PROMPTS} prompts (got {len(value)})")
    if kinds == {str}:
        return value
    return [_read_tokens(each, f"entry {place}, token") for place, each in enumerate(value)]


def _read_tokens(value: list[Any], where: str) -> list[int]:
    if not value:
        raise ValueError("lists of token ids must not be empty (got [])")
    tokens = [_read_whole(each) for each in value]
    for place, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token <= MAX_NUMBER:
            raise ValueError(f"{where} {place} must be a whole number in 0..{MAX_NUMBER} (got {shorten(token)})")
    return tokens


def _read_stop(value: Any) -> Any:
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise ValueError(f"must be text or a list of texts (got {shorten(value)})")
    if not all(texts):
        raise ValueError(f"must be texts of at least one character (got {shorten(value)})")
    if len(texts) > MAX_STOPS:
        raise ValueError(f"must be at most {MAX_STOPS} texts (got {len(texts)})")
    return texts


def _read_biases(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise ValueError(f"must be numbers by token id, at most {MAX_BIASES} (got {shorten(value)})")
    for token, number in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 19):
            raise ValueError(f"keys must be token ids (got {shorten(token)})")
        if type(number) not in (int, float) or not abs(number) <= MAX_BIAS:
            raise ValueError(
                f"must be a number in -{MAX_BIAS:.0f}..{MAX_BIAS:.0f} for token {token} (got {shorten(number)})"
            )
    biases = {int(token): float(number) for token, number in value.items()}
    if len(biases) < len(value):
        raise ValueError(f"keys must be different token ids (got {shorten(sorted(value))})")
    return biases


WHOLE = BeforeValidator(_read_whole)
"""Reads 5.0 as 5; it stands behind the bounds, so that these are bounds of the number in the schema too."""
Token = Annotated[int, Field(strict=True, ge=0, le=MAX_NUMBER), WHOLE]
GivenPrompt = Annotated[
    str
    | Annotated[list[Token], Field(min_length=1)]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)],
    BeforeValidator(_check_prompt),
]
Stops = Annotated[
    list[str],
    BeforeValidator(_read_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
                {"type": "null"},
            ]
        }
    ),
]
Biases = Annotated[
    dict[int, float],
    BeforeValidator(_read_biases),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "maxProperties": MAX_BIASES,
                    "propertyNames": {"pattern": "^[0-9]{1,18}$"},
                    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
                },
                {"type": "null"},
            ]
        }
    ),
]


class StreamOptions(RequestPart):
    """Options of a stream."""

    include_usage: bool | None = None
    """Whether a last chunk without choices tells the numbers of tokens."""
    include_obfuscation: bool | None = None
    """Taken and without effect: chunks carry no padding."""


class GenerationBody(RequestPart):
    """The fields that requests for completions and for chat share."""

    model: str
    """Name of a served model, as `/v1/models` lists it."""
    max_tokens: Annotated[int, Field(strict=True, ge=1, le=MAX_NUMBER), WHOLE] | None = None
    """Most new tokens of a choice."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the likeliest token; otherwise logits are divided by it and a token is drawn. Default 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from the likeliest tokens whose probabilities sum to this. Default 1."""
    top_k: Annotated[int, Field(strict=True, ge=-1, le=MAX_NUMBER), WHOLE] | None = None
    """Draw from this number of likeliest tokens; 0 or -1: from all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Draw from tokens whose probability is at least this share of the likeliest one's."""
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES), WHOLE] | None = None
    """Number of choices for each prompt."""
    stop: Stops = Field(default=[], validate_default=False)
    """Texts that end a choice; the choice ends before the text."""
    seed: Annotated[int, Field(strict=True, ge=-MAX_NUMBER - 1, le=MAX_NUMBER), WHOLE] | None = None
    """Seed of the draws; a new one for every request where it is absent."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted from the logits of tokens that the new text has."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted from a token's logit for each occurrence in the new text."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Above 1 tokens of the prompt and the new text become less likely."""
    logit_bias: Biases = Field(default={}, validate_default=False)
    """Number to add to the logit of a token, by token id."""
    ignore_eos: bool | None = None
    """Whether to go on after an end token."""
    stream: bool | None = None
    """Whether the text comes as server-sent events."""
    stream_options: StreamOptions | None = None
    """Options of a stream; only with `stream`."""
    response_format: ResponseFormat = None
    """Form of the answer: text, a JSON object, or JSON that keeps to a schema."""
    structured_outputs: StructuredOutputs | None = None
    """Other forms: a regular expression, a choice of texts, a JSON schema."""
    exit_tolerance: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Largest accepted difference at early exits; 0: the full depth; absent: the server's."""
    exit_depth: Annotated[int, Field(strict=True, ge=1, le=MAX_NUMBER), WHOLE] | None = None
    """Number of depths that every token runs."""
    return_tokens: bool | None = None
    """Whether choices tell each token with the depth it left at."""


class CompletionBody(GenerationBody):
    """Asks for continuations of prompts."""

    prompt: GivenPrompt
    """A text, token ids, or a list of either; each prompt has choices of its own."""
    max_tokens: Annotated[int, Field(strict=True, ge=0, le=MAX_NUMBER), WHOLE] | None = None
    """Most new tokens of a choice, 16 if absent; 0 only with `echo`."""
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    """Tell the log-probability of each token, and this number of likeliest ones."""
    echo: bool | None = None
    """Whether a choice begins with its prompt."""


class ChatBody(GenerationBody):
    """Asks for the next message of a conversation."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    """The conversation so far."""
    max_completion_tokens: Annotated[int, Field(strict=True, ge=1, le=MAX_NUMBER), WHOLE] | None = None
    """Most new tokens of a choice; the newer name of `max_tokens`."""
    logprobs: bool | None = None
    """Whether to tell the log-probability of each token."""
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    """Number of likeliest tokens to tell for each; only with `logprobs`."""
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    """Functions that the model may call."""
    tool_choice: ToolChoice = None
    """`none`, `auto` (the default), `required`, or one function; the last two are enforced."""
    parallel_tool_calls: bool | None = None
    """False: at most one call."""


class TokenizeBody(RequestPart):
    """Asks for the tokens of a text or of a conversation."""

    model: str
    """Name of a served model."""
    prompt: str | None = None
    """A text."""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] | None = None
    """A conversation, instead of a text."""


class DetokenizeBody(RequestPart):
    """Asks for the text of tokens."""

    model: str
    """Name of a served model."""
    tokens: list[Token]
    """Token ids."""
