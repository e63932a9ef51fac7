"""What a fit prints: ten lines, with every figure from the report."""

import pytest
from rich.cells import cell_len

from refold.cli.fit_tables import best_single, format_cost, format_loss, print_fit
from refold.cli.show import print_table
from refold.fitting.report import HeldOutText
from tests.fitting.conftest import make_report


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")


def test_a_fit_is_ten_lines_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    print_fit(make_report((0.35,)))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) <= 10
    assert lines[0] == "budget: bytes 35% of models/smol, counted at two bytes a number"
    assert lines[1] == "chosen: fit: int3 in 98 matrices, int4 in 60; width in 12 MLPs"
    assert lines[2].startswith(
        "costs: 34.8% of the bytes (93.7 MB), 64.8% of the cache (60.9 MB), 84.8% of the FLOPs (525"
    )
    told = "nats per token; divergence from the source: predicted +0.107, measured +0.153, beyond the stated error"
    assert lines[3].endswith(told)
    assert lines[4] == "by kind: bits +0.080 (bytes -55.8%); width +0.027 (bytes -3.3%, FLOPs -9.7%)"
    assert lines[5].startswith("runner-up: without width")
    assert lines[6].split()[3:] == ["fit", "int8", "int4", "low", "rank", "pruning", "width", "recursion"]
    assert lines[7].split() == ["bytes", "35%", "none", *["35%"] * 5]
    assert lines[8].split() == ["books", "+0.133", "+0.307", "+0.533", "+0.933", "+0.666", "+5.46"]


def test_a_fit_without_held_out_text_or_runner_up_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    found = make_report((0.35,))
    bare = {"measured": {}, "runner_up": None, "singles": (), "classes": (), "summary": ""}
    point = found.points[0].model_copy(update=bare)
    print_fit(found.model_copy(update={"points": (point,), "held_out": (), "notes": ("text of one kind",)}))
    out = capsys.readouterr().out
    assert "loss: predicted +0.107 nats per token; not measured, for lack of held-out text" in out
    assert "chosen: everything as it is" in out
    assert "by kind: nothing was changed" in out
    assert "runner-up: none" in out
    assert out.endswith("text of one kind\n")


def test_a_sweep_is_a_table_of_its_points(capsys: pytest.CaptureFixture[str]) -> None:
    print_fit(make_report((0.2, 0.4), ("bytes", "cache")))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1].split()[:4] == ["bytes", "limit", "bytes", "cache"]
    assert lines[2].split() == ["20%", "19.9%", "49.9%", "+1.000", "+1.25", "+1.62", "low", "rank", "+5.75"]
    assert lines[3].split()[-2:] == ["int4", "+0.207"]


def test_the_best_single_method_is_the_one_of_least_loss() -> None:
    point = make_report((0.4,)).points[0]
    best = best_single(point)
    assert best is not None
    assert best.name == "int4"
    assert best_single(point.model_copy(update={"singles": ()})) is None


def test_wide_and_long_names_keep_the_columns_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make_report((0.35,))
    names = {
        "books": "書籍と百科事典の文章のうち検証に使う部分",
        "encyclopedia": "/very/long/path" * 5 + "/docs.parquet",
    }
    point = found.points[0]
    measured = {names[name]: loss for name, loss in point.measured.items()}
    held_out = tuple(HeldOutText(name=name, tokens=10, loss=3.0) for name in names.values())
    renamed = found.model_copy(
        update={"held_out": held_out, "points": (point.model_copy(update={"measured": measured}),)}
    )
    print_fit(renamed)
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows[0].startswith("…")
    assert rows[1].split()[0] == "long/path/docs.parquet"
    ends = {cell_len(row[: row.index("+0.1") + 6]) for row in rows}
    assert len(ends) == 1
    monkeypatch.setenv("COLUMNS", "80")
    print_fit(renamed)
    assert all(cell_len(line) <= 80 for line in capsys.readouterr().out.splitlines()[-3:])


def test_columns_of_a_table_are_as_wide_as_their_characters(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "n"), [("日本語", "1"), ("abcdef", "2")])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [cell_len(line) for line in lines] == [9, 9, 9]


@pytest.mark.parametrize(
    ("loss", "text"),
    [(None, "-"), (0.0001, "+0.0001"), (-0.002, "-0.0020"), (0.046, "+0.046"), (1.5, "+1.50"), (12.345, "+12.35")],
)
def test_a_loss_has_its_sign_and_more_digits_near_zero(loss: float | None, text: str) -> None:
    assert format_loss(loss) == text


def test_costs_have_their_units() -> None:
    assert [format_cost("bytes", 94.2e6), format_cost("flops", 1.2e9), format_cost("milliseconds", 4.178)] == [
        "94.2 MB",
        "1.20B",
        "4.18 ms",
    ]
