"""Did-you-mean for error messages."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, legal: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the closest legal name, or an empty string where none is close."""
    close = difflib.get_close_matches(name, list(legal), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
