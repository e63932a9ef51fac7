"""Axes have round ticks inside of their span, and points lie at the places of their values."""

import math

import pytest

from refold.report.axes import fitting_scale, linear_scale, log_scale, plain, short_bytes, short_count
from refold.report.bars import Bar, BarRow, draw_bars
from refold.report.chart import ChartAxis, ChartText, PlotPoint, Series, draw_chart, style_of
from refold.report.drawing import Box, Marker, Stroke, Words, shorten, text_width
from refold.report.heat_map import RAMP, HeatTable, colour_of, draw_heat_map

TEXT = ChartText("name", "Title", "about")


@pytest.mark.parametrize("values", [[1.2, 1.9], [0.0], [-3.0, 5.0], [5.0, 5.0], [1e9, 3e9], [1e-6, 2e-6], [0.0, 0.0]])
def test_linear_ticks_are_round_and_inside(values: list[float]) -> None:
    scale = linear_scale(values, 300.0, 20.0)
    assert 2 <= len(scale.ticks) <= 7
    for value, _ in scale.ticks:
        assert scale.least - 1e-9 <= value <= scale.greatest + 1e-9
    steps = {
        round((two - one) / 10 ** math.floor(math.log10(two - one)), 6)
        for (one, _), (two, _) in zip(scale.ticks, scale.ticks[1:], strict=False)
    }
    assert steps <= {1.0, 2.0, 5.0, 10.0}
    assert scale.place(max(values)) >= 20.0
    assert scale.place(min(values)) <= 300.0


@pytest.mark.parametrize("values", [[1.0], [1e-3, 50.0], [3.0, 4.0], [128.0, 131_072.0], [0.0, 2.0, 90.0], [1e-9, 1e9]])
def test_log_ticks_are_round_and_few(values: list[float]) -> None:
    scale = log_scale(values, 0.0, 100.0, most=5)
    assert 1 <= len(scale.ticks) <= 5
    assert all(round(value / 10 ** math.floor(math.log10(value) + 1e-9), 6) in (1, 2, 3, 5) for value, _ in scale.ticks)
    assert scale.place(1e-30) == 0.0
    middle = math.sqrt(scale.least * scale.greatest)
    assert scale.place(middle) == pytest.approx(50.0)


def test_an_axis_is_logarithmic_only_where_values_differ_widely() -> None:
    assert not fitting_scale([1.0, 10.0], 0.0, 1.0).is_log
    assert fitting_scale([1.0, 13.0], 0.0, 1.0).is_log
    assert not fitting_scale([0.0, 13.0], 0.0, 1.0).is_log


def test_numbers_are_short() -> None:
    assert [short_bytes(each) for each in (0.0, 12.0, 39_609_344.0, 2e9)] == ["0 B", "12 B", "39.6 MB", "2 GB"]
    assert [short_count(each) for each in (0.0, 512.0, 32_768.0)] == ["0", "512", "32.8k"]
    assert [plain(each) for each in (0.05, 2.0, 12_000.0)] == ["0.05", "2", "12,000"]
    assert shorten("a name that is too long", 60.0).startswith("a n")
    assert text_width(shorten("x" * 90, 60.0)) <= 60.0
    assert shorten("short", 60.0) == "short"


def test_points_bars_and_lines_lie_at_their_values() -> None:
    points = (PlotPoint(1.0, 2.0, 1.5, 2.5), PlotPoint(3.0, 6.0))
    drawn = draw_chart(
        TEXT, ChartAxis("x"), ChartAxis("y"), [Series("one", points), Series("source", points[:1], is_source=True)]
    )
    marks = [item for item in drawn.items if isinstance(item, Marker)]
    first, second = marks[:2]
    ticks = {item.text: item for item in drawn.items if isinstance(item, Words) and item.text.isdigit()}
    # Both axes are linear: places are in proportion to the ticks.
    across = (ticks["3"].x - ticks["1"].x) / 2
    assert second.x - first.x == pytest.approx(2 * across)
    assert first.y > second.y
    line = next(item for item in drawn.items if isinstance(item, Stroke) and item.width == 1.8)
    assert line.points == ((first.x, first.y), (second.x, second.y))
    bar = next(item for item in drawn.items if isinstance(item, Stroke) and item.width == 1.2)
    assert {x for x, _ in bar.points} == {first.x}
    assert bar.points[0][1] - first.y == pytest.approx(first.y - bar.points[1][1])
    assert marks[2].colour == "ink"
    assert len({style_of(number)[:2] for number in range(42)}) == 42


def test_bars_are_as_long_as_their_values() -> None:
    rows = [BarRow("a", (Bar(1.0, 0.5), None)), BarRow("b", (Bar(2.0), Bar(-1.0)), mark=0.25)]
    drawn = draw_bars(TEXT, "value", ["one", "two"], rows)
    one, two, three = (item for item in drawn.items if isinstance(item, Box) and item.tip)
    assert two.width == pytest.approx(2 * one.width)
    assert three.width == pytest.approx(one.width)
    assert three.x + three.width == pytest.approx(one.x)
    assert one.fill == two.fill != three.fill


def test_a_heat_map_has_a_cell_for_each_number() -> None:
    table = HeatTable(("a", "b"), ("0", "1"), ((None, 0.25), (0.5, 1.0)), "share")
    drawn = draw_heat_map(TEXT, table)
    cells = {item.tip: item for item in drawn.items if isinstance(item, Box) and item.tip}
    assert cells.keys() == {"a, 1: 0.25", "b, 0: 0.5", "b, 1: 1"}
    assert cells["b, 1: 1"].fill == RAMP[-1]
    assert cells["a, 1: 0.25"].fill == RAMP[0]
    assert cells["b, 0: 0.5"].fill == colour_of(0.5, 0.25, 1.0)
    assert cells["b, 0: 0.5"].x == cells["b, 1: 1"].x - cells["b, 1: 1"].width
    assert {item.text for item in drawn.items if isinstance(item, Words)} >= {".25", ".50", "1.00"}
