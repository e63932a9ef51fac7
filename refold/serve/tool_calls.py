"""Calls of tools in the text of a model, read as the text comes."""

import ast
import json
import re
import uuid
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment


class CallFormat(NamedTuple):
    """How a family of models writes calls.

    Attributes:
        name: Of the format.
        sign: Text in the chat templates that use it.
        begin: Marks the begin of calls; empty: an answer that begins with `{` is one.
        end: Marks their end; empty: they take the rest of the answer.
    """

    name: str
    sign: str
    begin: str
    end: str


FORMATS = (
    CallFormat("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]", ""),
    CallFormat("phi", "<|tool_call|>", "<|tool_call|>", "<|/tool_call|>"),
    CallFormat("hermes", "<tool_call>", "<tool_call>", "</tool_call>"),
    CallFormat("llama", "<|python_tag|>", "<|python_tag|>", ""),
    CallFormat("llama", "Environment: ipython", "<|python_tag|>", ""),
    CallFormat("gemma", "```tool_code", "```tool_code", "```"),
)
"""Known formats, in the order in which they are looked for."""
ALWAYS = CallFormat("required", "", "", "")
"""An answer that can be nothing but calls."""


@lru_cache(maxsize=32)
def takes_tools(template: str) -> bool:
    """Says whether a chat template reads the variable `tools`; one that cannot be read does not."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    # Templates of transformers may mark generated text; the mark is no part of Jinja.
    plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)
    try:
        return "tools" in meta.find_undeclared_variables(environment.parse(plain))
    except TemplateSyntaxError:
        return False


def find_format(template: str) -> CallFormat | None:
    """Returns the format in which models of a chat template write calls; None: not a known one."""
    if "<function=" in template:
        # Parameters as tags of their own, not as JSON.
        return None
    return next((each for each in FORMATS if each.sign in template), None)


@dataclass
class CallPiece:
    """News of one call: its beginning, or more of its arguments.

    Attributes:
        index: Which call of the answer.
        arguments: Text to append.
        id: Name of this call; None: it has begun before.
        name: The function; None likewise.
    """

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass
class AnswerPieces:
    """The text and the calls that a piece of text completes.

    Attributes:
        content: Text that belongs to no call.
        calls: Pieces of calls.
    """

    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)

    def join(self, other: "AnswerPieces") -> None:
        """Takes what came next."""
        self.content += other.content
        for piece in other.calls:
            if self.calls and self.calls[-1].index == piece.index:
                self.calls[-1].arguments += piece.arguments
            else:
                self.calls.append(piece)


class CallReader:
    """Reads the text of one choice.

    Args:
        kind: Format of the calls.
        most: Most calls; further ones are dropped. None: no limit.
        name: The only function, where the text is nothing but its arguments.
    """

    def __init__(self, kind: CallFormat, most: int | None = None, name: str | None = None):
        self._format, self._most = kind, most
        self._waiting = ""
        self._is_inside = kind is ALWAYS
        self._is_begun = False
        self._objects = _Python(self) if kind.name == "gemma" else _Objects(self)
        self._given = AnswerPieces()
        self._blanks: str | None = None
        self.num_calls = 0
        self._only = name
        if name is not None:
            self.begin_call(name)

    def add(self, text: str) -> AnswerPieces:
        """Takes text and returns what it gives."""
        if self._only is not None:
            self.extend_call(text)
        else:
            self._waiting += text
            while self._advance():
                pass
        return self._take()

    def finish(self) -> AnswerPieces:
        """Returns what the end of the text gives."""
        if self._only is None:
            if self._is_inside:
                self._objects.add(self._waiting)
                self._objects.finish()
            else:
                self.keep(self._waiting)
            self._waiting = ""
        return self._take()

    def begin_call(self, name: str) -> None:
        """Begins the next call."""
        self.num_calls += 1
        self._blanks = ""
        if self._most is None or self.num_calls <= self._most:
            self._given.calls.append(CallPiece(self.num_calls - 1, "", f"call_{uuid.uuid4().hex[:24]}", name))

    def extend_call(self, arguments: str) -> None:
        """Adds to the arguments of the newest call."""
        if not arguments or (self._most is not None and self.num_calls > self._most):
            return
        last = self._given.calls[-1] if self._given.calls else None
        if last is not None and last.index == self.num_calls - 1:
            last.arguments += arguments
        else:
            self._given.calls.append(CallPiece(self.num_calls - 1, arguments))

    def keep(self, text: str) -> None:
        """Adds text that belongs to no call; white space around calls is dropped."""
        if self._blanks is not None:
            self._blanks += text
            if not self._blanks.strip():
                return
            text, self._blanks = self._blanks, None
        self._given.content += text

    def _take(self) -> AnswerPieces:
        given, self._given = self._given, AnswerPieces()
        return given

    def _advance(self) -> bool:
        """Reads one stretch of the waiting text; returns whether more may be read."""
        if not self._is_begun and not self._is_inside and self._format.name == "llama":
            if not self._waiting.strip():
                return False
            self._is_begun = True
            self._is_inside = self._waiting.lstrip().startswith("{")
        marker = self._format.end if self._is_inside else self._format.begin
        place = self._waiting.find(marker) if marker else -1
        if place < 0:
            ready = len(self._waiting) - _overlap(self._waiting, marker)
            self._give(self._waiting[:ready])
            self._waiting = self._waiting[ready:]
            return False
        self._give(self._waiting[:place])
        if self._is_inside and self._objects.is_text:
            # A mark within a string of the arguments ends nothing.
            self._give(marker[0])
            self._waiting = self._waiting[place + 1 :]
            return True
        self._waiting = self._waiting[place + len(marker) :]
        if self._is_inside:
            self._objects.finish()
        self._is_inside = not self._is_inside
        return True

    def _give(self, text: str) -> None:
        if self._is_inside:
            self._objects.add(text)
        elif text:
            self.keep(text)


_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')
_NAMED = re.compile(r"(?:\[TOOL_CALLS\])?([A-Za-z_][\w.\-]*)\s*(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?")
_MAX_PLAIN = 256
_BETWEEN = " \n\t\r[],;"
_MAX_CODE = 20_000


class _Objects:
    """Reads objects `{"name": ..., "arguments": {...}}`, one or several, in a list or not.

    The arguments are given on as they come. `NAME{...}` is a call too, as newer Mistral models write it.
    """

    def __init__(self, reader: CallReader):
        self._reader = reader
        self._reset()

    def _reset(self) -> None:
        self._object, self._plain = "", ""
        self._depth = 0
        self.is_text = self._is_escaped = False
        self._is_streaming = self._has_call = self._is_only_arguments = False

    def add(self, text: str) -> None:
        for character in text:
            if self._depth == 0:
                self._outside(character)
            else:
                self._inside(character)

    def finish(self) -> None:
        """Gives what is no call as text."""
        rest = self._plain + ("" if self._has_call else self._object)
        if rest.strip(_BETWEEN):
            self._reader.keep(rest)
        self._reset()

    def _outside(self, character: str) -> None:
        if character != "{":
            self._plain += character
            return
        plain = self._plain.strip() if len(self._plain) <= _MAX_PLAIN else ""
        named = _NAMED.fullmatch(plain)
        self._object, self._depth, self._has_call = "{", 1, False
        if named is not None:
            self._plain = ""
            self._reader.begin_call(named[1])
            self._reader.extend_call("{")
            self._is_streaming = self._has_call = self._is_only_arguments = True
        elif not self._plain.strip(_BETWEEN):
            self._plain = ""

    def _inside(self, character: str) -> None:
        self._object += character
        if self._is_streaming:
            self._reader.extend_call(character)
        if self.is_text:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self.is_text = False
        elif character == '"':
            self.is_text = True
        elif character in "{[":
            self._depth += 1
            head = _HEAD.fullmatch(self._object[:-1]) if self._depth == 2 and not self._has_call else None
            name = None if head is None else _read_name(head[1])
            if name is not None:
                self._reader.begin_call(name)
                self._reader.extend_call(character)
                self._is_streaming = self._has_call = True
        elif character in "}]":
            self._depth -= 1
            if self._depth <= 1 and not self._is_only_arguments:
                self._is_streaming = False
            if self._depth == 0:
                self._close()

    def _close(self) -> None:
        if not self._has_call:
            name, arguments = _read_call(self._object)
            if name is None:
                self._plain += self._object
            else:
                self._reader.begin_call(name)
                self._reader.extend_call(arguments)
        self._object, self._is_streaming, self._is_only_arguments, self._has_call = "", False, False, False


class _Python:
    """Reads calls written as Python, `f(a=1)`, one on each line."""

    def __init__(self, reader: CallReader):
        self._reader, self._code = reader, ""
        self._quote, self._is_escaped, self.is_text = "", False, False

    def add(self, text: str) -> None:
        self._code += text
        for character in text:
            if self._is_escaped:
                self._is_escaped = False
            elif not self._quote:
                self._quote = character if character in "'\"" else ""
            elif character == "\\":
                self._is_escaped = True
            elif character in (self._quote, "\n"):
                self._quote = ""
        self.is_text = bool(self._quote)

    def finish(self) -> None:
        code, self._code = self._code, ""
        self._quote, self._is_escaped, self.is_text = "", False, False
        calls = _read_python(code)
        if calls is None:
            self._reader.keep(code)
            return
        for name, arguments in calls:
            self._reader.begin_call(name)
            self._reader.extend_call(arguments)


def _read_call(text: str) -> tuple[str | None, str]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None, ""
    if not isinstance(found, dict):
        return None, ""
    if isinstance(found.get("function"), dict):
        found = found["function"]
    arguments = found.get("arguments", found.get("parameters", {}))
    name = found.get("name")
    if not isinstance(name, str) or not _is_writable(name):
        return None, ""
    if isinstance(arguments, str):
        return (name, arguments) if _is_writable(arguments) else (None, "")
    written = _write_json(arguments)
    return (None, "") if written is None else (name, written)


def _read_name(text: str) -> str | None:
    """Returns the name that a string of JSON holds; None: it holds none."""
    try:
        name = json.loads(text)
    except ValueError:
        return None
    return name if _is_writable(name) else None


def _is_writable(text: str) -> bool:
    """Says whether a text has no half of a surrogate pair, which no answer can hold."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _write_json(value: Any) -> str | None:
    """Returns a value as JSON; None: it has none."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return text if _is_writable(text) else json.dumps(value, allow_nan=False)
    except ValueError:
        return None


def _read_python(code: str) -> list[tuple[str, str]] | None:
    try:
        tree = ast.parse(code.strip()[:_MAX_CODE])
        calls = []
        for line in tree.body:
            call = line.value if isinstance(line, ast.Expr) else None
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print" and call.args:
                call = call.args[0]
            if not isinstance(call, ast.Call) or call.args:
                return None
            arguments = {each.arg: ast.literal_eval(each.value) for each in call.keywords if each.arg is not None}
            written, name = _write_json(arguments), ast.unparse(call.func)
            if written is None or len(arguments) < len(call.keywords) or not _is_writable(name):
                return None
            calls.append((name, written))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return calls


def _overlap(text: str, marker: str) -> int:
    """Returns the length of the end of a text that is a beginning of a marker."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
