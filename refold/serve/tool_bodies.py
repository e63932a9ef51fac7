"""Fields of requests about tools and about the form of the answer."""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from refold.generation.constraint import MAX_LENGTHS, MAX_STRINGS
from refold.serve.chat_messages import RequestPart
from refold.suggest import shorten

MAX_TOOLS = 128
"""Most tools of one request."""


def _check_schema(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON schema, an object (got {shorten(value)})")
    try:
        length = len(json.dumps(value))
    except RecursionError:
        raise ValueError("must be a JSON schema with less depth") from None
    if length > MAX_LENGTHS["schema"]:
        raise ValueError(f"must be at most {MAX_LENGTHS['schema']:,} characters as JSON (got {length:,})")
    return value


Schema = Annotated[dict[str, Any], BeforeValidator(_check_schema), WithJsonSchema({"type": "object"})]
NonEmpty = Annotated[str, Field(min_length=1)]
FunctionName = Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,128}$")]


class ToolFunction(RequestPart):
    """A function that the model may call."""

    name: FunctionName
    """Its name."""
    description: str | None = None
    """The purpose of the function; the model reads it."""
    parameters: Schema | None = None
    """JSON schema of its arguments."""
    strict: bool | None = None
    """True: only with a `tool_choice` that asks for a call, which keeps to the schema always."""


class Tool(RequestPart):
    """A tool."""

    type: Literal["function"]
    function: ToolFunction


class ChosenName(RequestPart):
    """The name of a function."""

    name: FunctionName


class ChosenFunction(RequestPart):
    """Asks for a call of one function."""

    type: Literal["function"]
    function: ChosenName


def _check_choice(value: Any) -> Any:
    if value in ("none", "auto", "required") or value is None:
        return value
    function = value.get("function") if isinstance(value, dict) else None
    if isinstance(function, dict) and isinstance(function.get("name"), str) and value.get("type") == "function":
        return value
    raise ValueError(
        f'must be none, auto, required, or {{"type": "function", "function": {{"name": ...}}}} (got {shorten(value)})'
    )


ToolChoice = Annotated[Literal["none", "auto", "required"] | ChosenFunction | None, BeforeValidator(_check_choice)]


class NamedSchema(RequestPart):
    """A schema with a name."""

    name: FunctionName
    """Its name."""
    description: str | None = None
    """Taken and without effect: the prompt is not changed."""
    schema_: Annotated[Schema, Field(alias="schema")]
    """The schema."""
    strict: bool | None = None
    """Taken and without effect: answers keep to the schema always."""


class TextFormat(RequestPart):
    """Asks for text."""

    type: Literal["text"]


class JsonFormat(RequestPart):
    """Asks for an object in JSON."""

    type: Literal["json_object"]


class SchemaFormat(RequestPart):
    """Asks for JSON that keeps to a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


def _check_format(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if value is not None and kind not in ("text", "json_object", "json_schema"):
        raise ValueError(f"must have the type text, json_object or json_schema (got {shorten(value)})")
    return value


ResponseFormat = Annotated[
    Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None,
    BeforeValidator(_check_format),
]


class StructuredOutputs(RequestPart):
    """Asks for text of a form; exactly one is given."""

    regex: Annotated[str, Field(min_length=1, max_length=MAX_LENGTHS["regex"])] | None = None
    """A regular expression that the whole text matches."""
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_STRINGS)] | None = (
        None
    )
    """Texts, one of which is the whole text."""
    json_: Annotated[Schema | None, Field(alias="json")] = None
    """A JSON schema that the text keeps to."""
