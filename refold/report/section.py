"""A section of a report: drawings and tables about one topic."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from refold.report.drawing import Drawing
from refold.report.record import ReportRun

LONG = 28
"""Letters of a cell above which its column has sentences."""


@dataclass(frozen=True)
class ReportTable:
    """A table; the first cell of each row names it. `is_closed`: a page shows it when it is asked for."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_closed: bool = False

    @property
    def texts(self) -> frozenset[int]:
        """Returns the columns of sentences, which are aligned at the left and may break."""
        columns = range(1, len(self.head))
        return frozenset(column for column in columns if any(len(row[column]) > LONG for row in self.rows))


@dataclass(frozen=True)
class ReportSection:
    """Heading, introduction, drawings and tables; `anchor` is its id in the page."""

    anchor: str
    title: str
    intro: str
    drawings: tuple[Drawing, ...] = ()
    tables: tuple[ReportTable, ...] = ()


@dataclass(frozen=True)
class Topic:
    """A kind of section.

    Attributes:
        make: Makes the section of runs; None: the runs have no data for it.
        missing: The quantity that is not measured where there is no section; empty: there is nothing to measure.
        command: The command that measures it, with MODEL and SOURCE.
    """

    make: Callable[[Sequence[ReportRun]], ReportSection | None]
    missing: str = ""
    command: str = ""


def titled(runs: Sequence[ReportRun], run: ReportRun, name: str) -> str:
    """Returns the name of a thing of a run, with the run's name in front where there are several runs."""
    return f"{run.name}: {name}" if len(runs) > 1 and name != run.name else name


def file_name(*parts: str) -> str:
    """Returns a name of a file from parts: small letters, digits and hyphens."""
    words = "-".join(parts).lower()
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in words)
    return "-".join(filter(None, kept.split("-")))[:80]


def with_error(value: float, error: float | None, digits: int = 3) -> str:
    """Writes a value with its standard error: `1.234 ± 0.005`."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def count_of(number: int, noun: str) -> str:
    """Returns a number of things, as `1 model` or `2 models`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
