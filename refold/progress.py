"""How a long command shows its progress: lines, progress bars, durations in words."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Say = Callable[[str], None]
"""Function that prints a line when a part begins."""
Report = Callable[[int, int], None]
"""Function that gets (steps done, total steps)."""


@contextlib.contextmanager
def _no_bar(label: str, unit: str) -> Iterator[Report]:
    yield lambda done, total: None


@dataclass(frozen=True)
class Show:
    """Shows the progress of a run to the user.

    Attributes:
        say: Prints a line.
        progress: Makes a progress bar from a label and a unit; its `with` statement gives a `Report`.
    """

    say: Say = lambda text: None
    progress: Callable[[str, str], contextlib.AbstractContextManager[Report]] = _no_bar


def describe_duration(hours: float) -> str:
    """Returns a duration in words: `40 seconds`, `12 minutes` or `3.5 hours`."""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} seconds"
    return f"{hours * 60:.0f} minutes" if hours < 2 else f"{hours:.1f} hours"
