"""A conversation: what chat data holds instead of a text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from refold.errors import DataError
from refold.suggest import did_you_mean

ASSISTANT = "assistant"
ROLES = (ASSISTANT, "user", "system", "developer", "tool")


@dataclass(frozen=True)
class Conversation:
    """Messages in order.

    Attributes:
        messages: at least one; `role` of `ROLES`, `content`, and whatever else the chat template reads (`tool_calls`,
            `name`, ...). Keys without a value are left out.
        where: file and place, for messages.
    """

    messages: tuple[dict[str, Any], ...]
    where: str = field(compare=False)


def read_conversation(value: object, where: str) -> Conversation:
    """Checks a `messages` list as it stands in a file.

    Args:
        value: a list of `{role, content}`. `content` may be missing where there are `tool_calls`.
        where: file and place, for messages.

    Raises:
        DataError: it is not such a list, a role is unknown, or the assistant says nothing in it.
    """
    if not isinstance(value, list | tuple) or not value:
        got = "an empty list" if isinstance(value, list | tuple) else _kind(value)
        raise DataError(f"{where}: a list of messages with role and content is required (got {got})")
    messages = tuple(_message(message, f"{where}, message {index}") for index, message in enumerate(value))
    if all(message["role"] != ASSISTANT for message in messages):
        roles = [message["role"] for message in messages]
        raise DataError(f"{where}: a message of the assistant is required (got roles {roles}); leave such rows out")
    return Conversation(messages, where)


def _message(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: an object with role and content is required (got {_kind(value)})")
    # Parquet gives every row the keys of all rows.
    message = {str(key): part for key, part in value.items() if part is not None}
    role = message.get("role")
    if role not in ROLES:
        hint = did_you_mean(str(role), ROLES)
        raise DataError(f"{where}: a role of {', '.join(ROLES)} is required (got {role!r}){hint}")
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise DataError(f"{where}: content must be a string (got {_kind(content)})")
    if content is not None and not _is_unicode(content):
        raise DataError(f"{where}: content must be Unicode text (got a lone surrogate)")
    return message


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
