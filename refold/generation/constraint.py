"""The form that a text must have: JSON, JSON by a schema, a regular expression, or one of several strings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refold.errors import RefoldError
from refold.suggest import must_be_one_of, shorten

KINDS = ("json", "schema", "regex", "strings")
MAX_LENGTHS = {"json": 0, "schema": 32_768, "regex": 2_048, "strings": 32_768}
"""Most characters of the text of each kind: grammars cost time and memory."""
MAX_STRINGS = 1_000


@dataclass(frozen=True)
class Constraint:
    """A form of text.

    Attributes:
        kind: `json`: a JSON object; `schema`: JSON that a schema accepts; `regex`: text that a regular expression
            matches as a whole; `strings`: one of several strings.
        text: The JSON schema; the expression, in the syntax of Rust's `regex`; or a JSON list of the strings. Empty for
            `json`.

    Raises:
        RefoldError: The text is too long, or no schema or list of strings.
    """

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RefoldError(f"constraint.kind: {must_be_one_of(self.kind, KINDS)}")
        if not isinstance(self.text, str):
            raise RefoldError(f"constraint.text: a string is required (got {shorten(self.text)})")
        most = MAX_LENGTHS[self.kind]
        if len(self.text) > most:
            raise RefoldError(f"constraint.text: must be at most {most} characters (got {len(self.text)})")
        if self.kind == "schema" and not isinstance(self._parsed(), dict):
            raise RefoldError(f"constraint.text: a JSON schema is required, an object (got {shorten(self.text)})")
        if self.kind == "regex" and not self.text:
            raise RefoldError("constraint.text: a regular expression is required (got an empty text)")
        if self.kind == "strings":
            self._check_strings()

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "Constraint":
        """Returns a constraint given as plain data, `kind` and `text`."""
        if unknown := set(given) - {"kind", "text"}:
            raise RefoldError(f"constraint: the fields are kind and text (got {shorten(sorted(map(str, unknown)))})")
        return cls(given.get("kind", ""), given.get("text", ""))

    @classmethod
    def schema(cls, schema: Mapping[str, Any]) -> "Constraint":
        """Returns the constraint to JSON that a schema accepts."""
        return cls("schema", json.dumps(schema))

    @classmethod
    def one_of(cls, strings: Sequence[str]) -> "Constraint":
        """Returns the constraint to one of several strings."""
        return cls("strings", json.dumps(list(strings)))

    @property
    def strings(self) -> tuple[str, ...]:
        """The strings of the kind `strings`; empty for other kinds."""
        return tuple(self._parsed()) if self.kind == "strings" else ()

    def _check_strings(self) -> None:
        given = self._parsed()
        if not isinstance(given, list) or not given or not all(isinstance(each, str) and each for each in given):
            raise RefoldError(f"constraint.text: a JSON list of strings is required (got {shorten(self.text)})")
        if len(given) > MAX_STRINGS:
            raise RefoldError(f"constraint.text: must be at most {MAX_STRINGS} strings (got {len(given)})")

    def _parsed(self) -> Any:
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as error:
            reason = str(error).partition("\n")[0][:100]
            raise RefoldError(f"constraint.text: JSON is required ({reason})") from None
