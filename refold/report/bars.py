"""Horizontal bars: rows of named values, one bar for each series, with error bars and reference marks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from refold.report.axes import Scale, TickForm, linear_scale, plain
from refold.report.chart import RIGHT, ROW, WIDTH, ChartText, heading, style_of, ticks_across
from refold.report.drawing import SMALL_SIZE, Box, Drawing, Item, Stroke, Words, shorten, text_width

MOST_LABEL = 150.0
"""Width of the names of rows."""
BAR, GAP = 13.0, 7.0


@dataclass(frozen=True)
class Bar:
    """One value with its standard error, if known."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class BarRow:
    """The bars of one name, one for each series; None: this series has no value. `mark`: such as the chance level."""

    name: str
    bars: tuple[Bar | None, ...]
    mark: float | None = None


def draw_bars(
    text: ChartText, title: str, names: Sequence[str], rows: Sequence[BarRow], form: TickForm = plain
) -> Drawing:
    """Draws rows of bars.

    Args:
        text: Name, title and description.
        title: Title of the axis of values.
        names: Names of the series, in the order of the bars of each row.
        rows: The rows, the uppermost first.
        form: Writes the ticks and the values.
    """
    labels = [shorten(row.name, MOST_LABEL, SMALL_SIZE) for row in rows]
    left = 14 + max(text_width(label, SMALL_SIZE) for label in labels)
    found = [(bar.value, bar.error or 0.0) for row in rows for bar in row.bars if bar is not None]
    values = [0.0, *(value + sign * error for value, error in found for sign in (-1, 1))]
    written = max(text_width(form(value), SMALL_SIZE) for value, _ in found) + 8
    scale = linear_scale(values, left, WIDTH - RIGHT - written, form, 4)
    top = 34.0
    bottom = top + sum(len(row.bars) * BAR + GAP for row in rows)
    items: list[Item] = [heading(text, WIDTH)]
    items += _grid(scale, top, bottom, title)
    y = top
    for row, label in zip(rows, labels, strict=True):
        items.append(Words(left - 6, y + (len(row.bars) * BAR + GAP) / 2 + 3.5, label, SMALL_SIZE, "end"))
        items += _row(row, y + GAP / 2, scale, form)
        y += len(row.bars) * BAR + GAP
    height = bottom + 40
    if len(names) > 1:
        for number, name in enumerate(names):
            place = bottom + 46 + number * ROW
            items.append(Box(10.0, place - 8, 10.0, 10.0, style_of(number)[0]))
            items.append(Words(26.0, place + 1, shorten(name, WIDTH - 40, SMALL_SIZE), SMALL_SIZE))
        height += len(names) * ROW + 6
    return Drawing(text.name, text.title, text.about, WIDTH, height, tuple(items))


def _grid(scale: Scale, top: float, bottom: float, title: str) -> Iterator[Item]:
    yield from ticks_across(scale, top, bottom, zero="ink")
    middle = (scale.start + scale.end) / 2
    yield Words(middle, bottom + 29, shorten(title, 2 * (WIDTH - middle), SMALL_SIZE), SMALL_SIZE, "middle", "quiet")


def _row(row: BarRow, top: float, scale: Scale, form: TickForm) -> Iterator[Item]:
    for number, bar in enumerate(row.bars):
        if bar is None:
            continue
        y, zero, end = top + number * BAR, scale.place(0.0), scale.place(bar.value)
        tip = f"{row.name}: {form(bar.value)}"
        yield Box(min(zero, end), y + 1, abs(end - zero), BAR - 2, style_of(number)[0], tip=tip)
        reach = max(zero, end)
        if bar.error:
            low, high = scale.place(bar.value - bar.error), scale.place(bar.value + bar.error)
            yield Stroke(((low, y + BAR / 2), (high, y + BAR / 2)), "ink", 1.2)
            reach = max(reach, high)
        yield Words(reach + 5, y + BAR / 2 + 3.5, form(bar.value), SMALL_SIZE)
    if row.mark is not None:
        place = scale.place(row.mark)
        yield Stroke(((place, top - 1), (place, top + len(row.bars) * BAR + 1)), "ink", 1.6, (3.0, 2.0))
