"""Parts of error messages: shortened values, and the closest legal name."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

MAX_NUMBER = 2**63 - 1
"""The largest whole number that is accepted anywhere: the largest signed 64-bit integer."""
MAX_ECHO = 200
"""Maximum number of characters of a value in a message."""


class _Shortened(reprlib.Repr):
    """A `repr` with bounded depth, entries and characters."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 100, 100
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 6

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**40 else f"a number of {x.bit_length()} bits"


_SHORTENED = _Shortened()


def shorten(value: Any, length: int = MAX_ECHO) -> str:
    """Returns the `repr` of a value for a message, with at most `length` characters."""
    text = _SHORTENED.repr(value)
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def did_you_mean(name: str, legal: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the closest legal name, or an empty string if no name is close."""
    close = difflib.get_close_matches(name[:MAX_ECHO], list(legal), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def must_be_one_of(got: object, legal: Iterable[str]) -> str:
    """Returns `must be one of a, b (got 'x')`, with the closest legal name if there is one."""
    names = list(legal)
    hint = did_you_mean(got, names) if isinstance(got, str) else ""
    return f"must be one of {', '.join(names)} (got {shorten(got)}){hint}"
