from pathlib import Path
from typing import Any

import pytest

from refold.cli.compare_tables import list_notes, markdown, print_comparison, require_free_page, table_cells, write_page
from refold.errors import FolderError
from refold.scorecard.score_table import ScoreCell, ScoreColumn, ScoreRow, ScoreTable


def row(name: str, unit: str, *cells: ScoreCell | None, section: str = "text") -> ScoreRow:
    return ScoreRow(section=section, name=name, unit=unit, is_better="lower", cells=cells)


@pytest.fixture
def table() -> ScoreTable:
    tested: dict[str, Any] = {"difference_error": 0.004, "pairs": 29, "p": 0.01, "corrected_p": 0.02}
    columns = (
        ScoreColumn(name="source", model="models/source", pairs={}, notes=()),
        ScoreColumn(
            name="healed", model="out/healed", pairs={"text": (29, 29), "tasks": (100, 500)}, notes=("a note",)
        ),
        ScoreColumn(name="other", model="out/other", pairs={"noise": (0, 0)}, notes=()),
    )
    rows = (
        row("weight bytes", "bytes", ScoreCell(value=2e6), ScoreCell(value=5e5, difference=-1.5e6), None),
        row(
            "bits per byte",
            "bits",
            ScoreCell(value=1.25, error=0.05),
            ScoreCell(value=1.5, error=0.06, difference=0.25, verdict="worse", **tested),
            ScoreCell(value=1.2, error=0.06, difference=-0.05, verdict="undecided", **tested),
        ),
        row("piqa | acc", "share", ScoreCell(value=0.5, error=0.02), ScoreCell(value=0.6, difference=0.1), None),
        row("first token", "seconds", None, ScoreCell(value=0.5), None),
    )
    return ScoreTable(level=0.05, columns=columns, rows=rows, rule="the rule")


def test_cells_have_errors_differences_and_verdicts(table):
    names, rows = table_cells(table)
    assert names == ["", "source", "healed", "difference", "other", "difference"]
    assert rows[0] == ["weight bytes", "2.0 MB", "500.0 kB", "-75.0%", "-", ""]
    assert rows[1][1:] == ["1.2500 ± 0.0500", "1.5000", "+0.2500 ± 0.0040 worse", "1.2000", "-0.0500 ± 0.0040"]
    assert rows[2][1:4] == ["50.00% ± 2.00", "60.00%", "+10.00"]
    assert rows[3] == ["first token", "-", "500.0 ms", "", "-", ""]


def test_pairs_and_reasons_are_told_for_each_column(table):
    assert list_notes(table) == [
        "± is a standard error. the rule",
        "healed: paired: text over 29 documents, tasks over 100 to 500 items of each task",
        "healed: a note",
        "other: not paired: noise",
    ]


def test_the_table_fits_80_columns(table, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_comparison(table)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "worse" in printed


def test_markdown_has_one_row_for_each_figure(table):
    lines = markdown(table).splitlines()
    assert "| piqa \\| acc | 50.00% ± 2.00 | 60.00% | +10.00 | - |  |" in lines
    assert "- source: `models/source` (the baseline)" in lines
    assert "- healed: a note" in lines
    bars = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
    assert bars == {7}


def test_only_a_page_of_compare_is_replaced(table, tmp_path: Path):
    mine, page = tmp_path / "notes.md", tmp_path / "page.md"
    mine.write_text("mine")
    write_page(table, page, overwrite=False)
    with pytest.raises(FolderError, match=r"page.md: a new file is required \(it exists\)"):
        write_page(table, page, overwrite=False)
    write_page(table, page, overwrite=True)
    with pytest.raises(FolderError, match="got another file"):
        write_page(table, mine, overwrite=True)
    with pytest.raises(FolderError, match=r"a name that ends in .md is required; name one, or print --json into a"):
        require_free_page(tmp_path / "page.html", overwrite=False)
    assert mine.read_text() == "mine"
