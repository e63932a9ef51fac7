"""A comparison of scorecards as a table of the terminal and as a page of markdown."""

from collections.abc import Sequence
from pathlib import Path

from refold.checkpoint.atomic_file import require_free, write_text
from refold.cli.show import format_bytes, print_table, print_text
from refold.errors import FolderError
from refold.scorecard.score_table import ScoreCell, ScoreColumn, ScoreRow, ScoreTable

_MARK = "<!-- written by refold compare -->\n"


def print_comparison(found: ScoreTable) -> None:
    """Prints the table, and the tests and reasons below it."""
    print_table(*table_cells(found))
    print()
    for line in list_notes(found):
        print_text(line)


def table_cells(found: ScoreTable) -> tuple[list[str], list[list[str]]]:
    """Returns the names of columns and the cells of each row: a value of each model, and its difference."""
    names = ["", found.columns[0].name]
    for column in found.columns[1:]:
        names += [column.name, "difference"]
    rows = []
    for row in found.rows:
        base = row.cells[0]
        cells = [row.name, _value(row, base, with_error=True)]
        for cell in row.cells[1:]:
            cells += [_value(row, cell, with_error=base is None), _difference(row, cell, base)]
        rows.append(cells)
    return names, rows


def list_notes(found: ScoreTable) -> list[str]:
    """Returns the lines below the table: pairs and left-out rows of each column, and the rule of the tests."""
    lines = [f"± is a standard error. {found.rule}"]
    for column in found.columns[1:]:
        pairs = _describe_pairs(column)
        lines += [f"{column.name}: {line}" for line in ((pairs, *column.notes) if pairs else column.notes)]
    return lines


def markdown(found: ScoreTable) -> str:
    """Returns the comparison as a page of markdown."""
    names, rows = table_cells(found)
    numbers = ["---", *("---:" for _ in names[1:])]
    table = [_line(names), _line(numbers), *map(_line, rows)]
    models = [f"- {column.name}: `{column.model}`" for column in found.columns]
    models[0] += " (the baseline)"
    notes = [f"- {line}" for line in list_notes(found)]
    return _MARK + "\n".join([*table, "", *models, "", *notes, ""])


def require_free_page(path: Path, overwrite: bool) -> Path:
    """Checks that a page can be written, and returns its path.

    Raises:
        FolderError: It is not named as markdown, or a file exists that must not be replaced.
    """
    if path.suffix != ".md":
        raise FolderError(f"{path}: a name that ends in .md is required; name one, or print --json into a file")
    return require_free(path, "page of `compare`", _is_page, overwrite)


def write_page(found: ScoreTable, path: Path, overwrite: bool) -> None:
    """Writes the comparison as a page of markdown, atomically."""
    write_text(require_free_page(path, overwrite), markdown(found))


def _is_page(path: Path) -> bool:
    try:
        return path.read_bytes().startswith(_MARK.encode())
    except OSError:
        return False


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(row: ScoreRow, cell: ScoreCell | None, with_error: bool) -> str:
    if cell is None:
        return "-"
    text = {
        "bytes": format_bytes(cell.value),
        "bits": f"{cell.value:.4f}",
        "share": f"{cell.value:.2%}",
        "seconds": f"{1000 * cell.value:,.1f} ms",
        "rate": f"{cell.value:,.1f}",
        "number": f"{cell.value:.3f}",
    }[row.unit]
    return text + (_error(row, cell.error) if with_error else "")


def _error(row: ScoreRow, error: float | None) -> str:
    if error is None:
        return ""
    return f" ± {100 * error:.2f}" if row.unit == "share" else f" ± {error:.4f}"


def _difference(row: ScoreRow, cell: ScoreCell | None, base: ScoreCell | None) -> str:
    if cell is None or base is None or cell.difference is None:
        return ""
    if row.unit in ("bytes", "seconds", "rate"):
        return f"{cell.difference / base.value:+.1%}" if base.value else "-"
    text = {"bits": f"{cell.difference:+.4f}", "share": f"{100 * cell.difference:+.2f}"}.get(
        row.unit, f"{cell.difference:+.3f}"
    )
    verdict = cell.verdict if cell.verdict in ("better", "worse") else ""
    return f"{text}{_error(row, cell.difference_error)} {verdict}".rstrip()


def _describe_pairs(column: ScoreColumn) -> str:
    words = {"text": "documents", "tasks": "items of each task", "recall": "items"}
    paired, unpaired = [], []
    for section, (fewest, most) in column.pairs.items():
        if most == 0:
            unpaired.append(section)
            continue
        count = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
        paired.append(f"{section} over {count} {words.get(section, 'items')}")
    parts = [f"paired: {', '.join(paired)}"] if paired else []
    parts += [f"not paired: {', '.join(unpaired)}"] if unpaired else []
    return "; ".join(parts)
