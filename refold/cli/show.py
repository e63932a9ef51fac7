"""Printing of results to stdout, and of notes and progress to stderr."""

import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from refold.checkpoint.atomic_file import json_text

MAX_WORD_WIDTH = 40
"""Longest word of a table that is never broken."""
MAX_NUMBER_WIDTH = 16
"""Longest cell of a number with a unit that is never broken."""


def print_json(data: Any) -> None:
    """Prints plain data or a pydantic model as JSON, with each list of numbers or words on one line."""
    plain = data.model_dump(mode="json") if hasattr(data, "model_dump") else data
    print(json_text(plain, default=str))


def console_width() -> int:
    """Returns the width of a line: the width of the terminal, or `COLUMNS`, or 240 if stdout is a file."""
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return 240
    return max(40, shutil.get_terminal_size().columns)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Prints a table with words on the left and numbers on the right, and breaks lines between words if necessary."""
    from rich.console import Console
    from rich.table import Table

    cells = [[row[index] for row in rows] for index in range(len(columns))]
    is_number = [any(cell[:2].strip("+-").isdigit() for cell in column) for column in cells]
    table = Table(box=None, pad_edge=False, header_style="bold")
    widths = _column_widths(columns, cells, is_number)
    for index, (name, width) in enumerate(zip(columns, widths, strict=True)):
        justify = "right" if index > 0 and is_number[index] else "left"
        table.add_column(name, justify=justify, overflow="fold", width=width)
    for row in rows:
        table.add_row(*row)
    if title is not None:
        print_text(title)
    Console(width=sum(widths) + 2 * len(widths), markup=False, highlight=False).print(table)


def _column_widths(columns: Sequence[str], cells: Sequence[Sequence[str]], is_number: Sequence[bool]) -> list[int]:
    """Returns widths that fit the terminal, but at least the widths that break no word."""
    from rich.cells import cell_len

    widths, least, whole_cells = [], [], []
    for name, column, number in zip(columns, cells, is_number, strict=True):
        # A number and its unit stay on one line.
        whole = [cell for cell in column if number and cell_len(cell) <= MAX_NUMBER_WIDTH]
        longest = max(map(cell_len, (*name.split(), *" ".join(column).split(), *whole)), default=1)
        widths.append(max(map(cell_len, (name, *column))) or 1)
        least.append(min(longest, MAX_WORD_WIDTH, widths[-1]))
        whole_cells.append(max(least[-1], *map(cell_len, column), 1))
    # Names of columns are broken before cells. In each step the column with most spare width becomes narrower.
    for floor in (whole_cells, least):
        while sum(widths) + 2 * (len(widths) - 1) > console_width() and any(map(int.__gt__, widths, floor)):
            index = max(range(len(widths)), key=lambda each: widths[each] - floor[each])
            widths[index] -= 1
    return widths


def print_text(text: str, bullet: str = "") -> None:
    """Prints a sentence with line breaks between words, as an entry of a list if there is a `bullet`."""
    width = console_width()
    print(
        textwrap.fill(text, width, initial_indent=bullet, subsequent_indent=" " * len(bullet), break_on_hyphens=False)
    )


def format_bytes(count: int | float) -> str:
    """Returns a size as `20.5 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def format_count(count: int | float) -> str:
    """Returns a number as `1.10B`, with three digits and a suffix."""
    for unit in ("", "k", "M"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.2f}{unit}"
        count /= 1000
    return f"{count:.2f}B" if count < 1000 else f"{count / 1000:.2f}T"


def note(text: str) -> None:
    """Prints a line that is no result to stderr."""
    print(text, file=sys.stderr)


@contextlib.contextmanager
def progress(label: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar on stderr and gives its function of (done, total); without a terminal shows nothing."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
