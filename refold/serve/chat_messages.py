"""Messages of a conversation, as a request gives them and as chat templates take them."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from refold.suggest import must_be_one_of, shorten

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_PARTS = {"image_url": "images", "input_audio": "audio", "file": "files", "video_url": "videos"}


class RequestPart(BaseModel):
    """A part of a body: no other fields, no conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TextContent(RequestPart):
    """A part of a content."""

    type: Literal["text"]
    text: str


class FunctionCall(RequestPart):
    """A function and its arguments."""

    name: Annotated[str, Field(min_length=1)]
    arguments: str
    """An object in JSON."""


class ToolCall(RequestPart):
    """A call that the model made."""

    id: str
    type: Literal["function"]
    function: FunctionCall


def _check_content(value: Any) -> Any:
    if not isinstance(value, list):
        if isinstance(value, str):
            return value
        raise ValueError(f"must be text or a list of text parts (got {shorten(value)})")
    for place, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in _OTHER_PARTS:
            raise ValueError(
                f"part {place}: {_OTHER_PARTS[kind]} are not supported, because the model reads text alone"
            )
        if kind != "text" or not isinstance(part.get("text"), str) or len(part) > 2:
            raise ValueError(f'part {place} must be {{"type": "text", "text": ...}} (got {shorten(part)})')
    return value


def _check_optional_content(value: Any) -> Any:
    return value if value is None else _check_content(value)


Content = Annotated[str | list[TextContent], BeforeValidator(_check_content)]


class InstructionMessage(RequestPart):
    """Instructions of the developer."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(RequestPart):
    """A message of the user."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(RequestPart):
    """A message that the model wrote."""

    role: Literal["assistant"]
    content: Annotated[str | list[TextContent] | None, BeforeValidator(_check_optional_content)] = None
    name: str | None = None
    refusal: None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None


class ToolMessage(RequestPart):
    """The result of a call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


def _tag(value: Any) -> str:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    if isinstance(role, str) and role in ROLES:
        return "<instruction>" if role in ("system", "developer") else f"<{role}>"
    return "<none>"


def _check_role(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"must be an object with a role and a content (got {shorten(value)})")
    if value.get("role") not in ROLES:
        raise ValueError(f"role {must_be_one_of(value.get('role'), ROLES)}")
    return value


ChatMessage = Annotated[
    Annotated[InstructionMessage, Tag("<instruction>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    Discriminator(_tag),
    BeforeValidator(_check_role),
]


def for_template(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns messages as chat templates take them: contents as text, arguments of calls as objects."""
    given = []
    for message in messages:
        content = message.content
        entry: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": "".join(part.text for part in content) if isinstance(content, list) else content,
        }
        if message.name is not None:
            entry["name"] = message.name
        if isinstance(message, ToolMessage):
            entry["tool_call_id"] = message.tool_call_id
        if isinstance(message, AssistantMessage):
            entry["content"] = entry["content"] or ""
            if message.tool_calls:
                entry["tool_calls"] = [_call_for_template(call) for call in message.tool_calls]
        given.append(entry)
    return given


def _call_for_template(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
