"""Words of error messages about a name that is not among the legal ones."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, legal: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the closest legal name, or an empty string where none is close."""
    close = difflib.get_close_matches(name, list(legal), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def must_be_one_of(got: object, legal: Iterable[str]) -> str:
    """Returns `must be one of a, b (got 'x')`, with the closest legal name where one is close."""
    names = list(legal)
    return f"must be one of {', '.join(names)} (got {got!r}){did_you_mean(str(got), names)}"
