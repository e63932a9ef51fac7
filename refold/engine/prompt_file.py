"""Files of prompts: JSON lines, each a prompt with settings of its own."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from refold.errors import DataError, RefoldError
from refold.generation.prompts import Messages
from refold.generation.sampling import Sampling
from refold.suggest import did_you_mean, shorten

_SETTINGS = tuple(field.name for field in fields(Sampling))
_FIELDS = ("prompt", "messages", "id", *_SETTINGS)


@dataclass(frozen=True)
class PromptLine:
    """One prompt of a file.

    Attributes:
        where: File and number of the line, for messages.
        prompt: A text, token ids, or the messages of a conversation.
        sampling: Its settings.
        id: The `id` of the line; None: it has none.
    """

    where: str
    prompt: str | Sequence[int] | Messages
    sampling: Sampling
    id: str | int | None = None


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file.

    Attributes:
        path: The file.
        sha256: Hash of its bytes.
        lines: Its prompts in order; empty lines do not count.
    """

    path: Path
    sha256: str
    lines: tuple[PromptLine, ...]


def read_prompts(path: str | Path, sampling: Sampling) -> PromptFile:
    """Reads a file of prompts and checks all lines.

    A line is a JSON object with `prompt` (a text or token ids) or `messages`, and optionally `id` and fields of
    `Sampling`.

    Args:
        path: The file.
        sampling: Settings that a line may replace.

    Raises:
        DataError: The file is missing or has no prompt, or a line is broken; the message names the line.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: a file of prompts is required ({error.strerror}); check the path") from None
    lines: list[PromptLine] = []
    ids: dict[str | int, str] = {}
    for number, raw in enumerate(data.splitlines(), start=1):
        if not raw.strip():
            continue
        line = _read_line(f"{path}:{number}", raw, sampling)
        if line.id is not None and ids.setdefault(line.id, line.where) != line.where:
            raise DataError(
                f"{line.where}: id: each id must occur once (got {shorten(line.id)}, as in {ids[line.id]}); change one"
            )
        lines.append(line)
    if not lines:
        raise DataError(f"{path}: at least one prompt is required (got none); write one JSON object a line")
    return PromptFile(path, hashlib.sha256(data).hexdigest(), tuple(lines))


def _read_line(where: str, raw: bytes, sampling: Sampling) -> PromptLine:
    try:
        entry = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0][:100]
        raise DataError(f'{where}: a JSON object is required ({reason}); write {{"prompt": "..."}}') from None
    if not isinstance(entry, dict):
        raise DataError(f'{where}: a JSON object is required (got {shorten(entry)}); write {{"prompt": "..."}}')
    for name in entry:
        if name not in _FIELDS:
            raise DataError(
                f"{where}: {shorten(name)} is no field of a prompt{did_you_mean(name, _FIELDS)}; the fields are "
                f"{', '.join(_FIELDS)}"
            )
    given = entry.get("id")
    if given is not None and (not isinstance(given, str | int) or isinstance(given, bool)):
        raise DataError(f"{where}: id: a string or a whole number is required (got {shorten(given)})")
    settings = {name: entry[name] for name in _SETTINGS if name in entry}
    if isinstance(settings.get("logit_bias"), dict):
        settings["logit_bias"] = {_token(name): value for name, value in settings["logit_bias"].items()}
    try:
        return PromptLine(where, _read_prompt(entry), replace(sampling, **settings), given)
    except RefoldError as error:
        raise DataError(f"{where}: {error}") from None


def _read_prompt(entry: dict[str, Any]) -> str | list[int] | list[dict[str, Any]]:
    if ("prompt" in entry) == ("messages" in entry):
        got = "both" if "prompt" in entry else "neither"
        raise RefoldError(f"prompt: either `prompt` or `messages` is required (got {got})")
    if "messages" in entry:
        messages = entry["messages"]
        is_list = isinstance(messages, list) and all(isinstance(each, dict) and "role" in each for each in messages)
        if not messages or not is_list:
            raise RefoldError(
                f"messages: a list of objects with `role` and `content` is required (got {shorten(messages)})"
            )
        return messages
    prompt = entry["prompt"]
    is_ids = isinstance(prompt, list) and all(type(each) is int and each >= 0 for each in prompt)
    if not isinstance(prompt, str) and not (prompt and is_ids):
        raise RefoldError(f"prompt: a text or a list of token ids is required (got {shorten(prompt)})")
    return prompt


def _token(name: str) -> str | int:
    # Keys of JSON objects are strings.
    return int(name) if name.isascii() and name.isdigit() and len(name) < 19 else name
