"""The result of a comparison of scorecards: a column for each, the first one the baseline."""

from typing import Literal

from refold.evaluation.result import FORMAT
from refold.scorecard.record import ScoreRecord


class ScoreCell(ScoreRecord):
    """A figure of one model, and its difference from the baseline."""

    value: float
    error: float | None = None
    """Standard error of the value."""
    difference: float | None = None
    """Figure minus the baseline's, over the pairs where they are paired; None in the baseline's own column."""
    difference_error: float | None = None
    pairs: int = 0
    """Documents or items that the difference is paired over; 0: not paired."""
    p: float | None = None
    """Two-sided p-value of the difference, not corrected; None: not tested."""
    corrected_p: float | None = None
    """The p-value after Holm's correction for all tested rows of the column."""
    verdict: Literal["better", "worse", "undecided"] | None = None
    """By the corrected p-value; None: not tested."""


class ScoreRow(ScoreRecord):
    """One figure of all models."""

    section: str
    name: str
    unit: str
    """`bytes`, `bits` for each byte of text, `share`, `seconds`, `rate` in tokens per second, or `number`."""
    is_better: Literal["lower", "higher"] | None
    cells: tuple[ScoreCell | None, ...]
    """One for each model; None: the model has no such figure, or it cannot be compared with the baseline's."""


class ScoreColumn(ScoreRecord):
    """One model of a comparison."""

    name: str
    """Name that tells it from the others."""
    model: str
    """Its folder or hub id."""
    pairs: dict[str, tuple[int, int]]
    """Fewest and most pairs of the tested rows of each section; 0: not paired."""
    notes: tuple[str, ...]
    """Reasons why rows are left out or not paired."""


class ScoreTable(ScoreRecord):
    """A comparison of scorecards."""

    format: int = FORMAT
    level: float
    """Chance that a column without any real difference has a row with a verdict other than `undecided`."""
    columns: tuple[ScoreColumn, ...]
    rows: tuple[ScoreRow, ...]
    rule: str
    """The tests and their correction, in words."""
