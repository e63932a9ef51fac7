"""Heat maps: a table of numbers as coloured cells, with the numbers where they have room."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from refold.pages.palette import contrast
from refold.report.axes import plain
from refold.report.chart import WIDTH, ChartText, heading
from refold.report.drawing import SMALL_SIZE, Box, Drawing, Item, Words, shorten, text_width

RAMP = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838")
"""The colour map cividis, which colour-blind readers see as others do, from low to high."""
LARGEST_CELL, ROOM = 34.0, 25.0
"""Greatest size of a cell, and the least width of a cell with its number."""


@dataclass(frozen=True)
class HeatTable:
    """Numbers by row and column; None: no number. `quantity` names them."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    quantity: str
    across: str = ""
    down: str = ""


def draw_heat_map(text: ChartText, table: HeatTable) -> Drawing:
    """Draws a table of numbers as a heat map."""
    labels = [shorten(name, 110.0, SMALL_SIZE) for name in table.rows]
    left = 10 + max(text_width(label, SMALL_SIZE) for label in labels)
    size = min(LARGEST_CELL, (WIDTH - left - 8) / len(table.columns))
    height = min(size, 20.0)
    found = [value for row in table.values for value in row if value is not None]
    least, greatest = min(found), max(found)
    is_turned = any(text_width(name, SMALL_SIZE) > size - 2 for name in table.columns)
    longest = max(text_width(name, SMALL_SIZE) for name in table.columns)
    # Not every column is named where a name is higher than a column is wide.
    every = max(1, -(-12 // int(max(size, 1)))) if is_turned else 1
    top = 44.0 + (longest + 4 if is_turned else 12)
    items: list[Item] = [heading(text, WIDTH)]
    items.append(Words(left, 34.0, shorten(table.across, WIDTH - left, SMALL_SIZE), SMALL_SIZE, colour="quiet"))
    if table.down:
        items.append(Words(2.0, 34.0, shorten(table.down, left - 8, SMALL_SIZE), SMALL_SIZE, colour="quiet"))
    for number, name in enumerate(table.columns):
        middle = left + (number + 0.5) * size
        if is_turned and number % every == 0:
            items.append(Words(middle + 3.5, top - 4, name, SMALL_SIZE, is_turned=True))
        elif not is_turned:
            items.append(Words(middle, top - 4, name, SMALL_SIZE, "middle"))
    every_row = max(1, -(-11 // int(max(height, 1))))
    for number, (label, row) in enumerate(zip(labels, table.values, strict=True)):
        y = top + number * height
        if number % every_row == 0:
            items.append(Words(left - 5, y + height / 2 + 3.5, label, SMALL_SIZE, "end"))
        for column, value in enumerate(row):
            name = f"{table.rows[number]}, {table.columns[column]}"
            items += _cell(Box(left + column * size, y, size, height), value, (least, greatest), name)
    bottom = top + len(labels) * height
    items += _key(left, bottom + 10, (least, greatest), table.quantity)
    return Drawing(text.name, text.title, text.about, WIDTH, bottom + 52, tuple(items))


def colour_of(value: float, least: float, greatest: float) -> str:
    """Returns the colour of a value between two ends."""
    share = (value - least) / (greatest - least) if greatest > least else 1.0
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    mixed = (
        round(
            int(RAMP[low][each : each + 2], 16) * (1 - place + low)
            + int(RAMP[low + 1][each : each + 2], 16) * (place - low)
        )
        for each in (1, 3, 5)
    )
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _cell(box: Box, value: float | None, ends: tuple[float, float], name: str) -> Iterator[Item]:
    if value is None:
        return
    colour = colour_of(value, *ends)
    yield Box(box.x, box.y, box.width, box.height, colour, tip=f"{name}: {value:.4g}")
    written = _written(value, ends)
    if box.width >= max(ROOM, text_width(written, SMALL_SIZE - 2) + 2) and box.height >= 12:
        ink = max(("#000000", "#ffffff"), key=lambda each: contrast(each, colour))
        yield Words(box.x + box.width / 2, box.y + box.height / 2 + 3, written, SMALL_SIZE - 2, "middle", ink)


def _written(value: float, ends: tuple[float, float]) -> str:
    digits = 3 if ends[1] - ends[0] < 0.05 else 2
    return f"{value:.{digits}f}".removeprefix("0") if 0 <= value < 1 else f"{value:.{digits}f}"


def _key(left: float, top: float, ends: tuple[float, float], quantity: str) -> Iterator[Item]:
    width, parts = min(180.0, WIDTH - left - 20), 36
    for part in range(parts):
        colour = colour_of(float(part), 0.0, parts - 1.0)
        yield Box(left + part * width / parts, top, width / parts + 0.3, 9.0, colour)
    yield Words(left, top + 21, plain(round(ends[0], 3)), SMALL_SIZE)
    yield Words(left + width, top + 21, plain(round(ends[1], 3)), SMALL_SIZE, "end")
    yield Words(left, top + 35, shorten(quantity, WIDTH - left, SMALL_SIZE), SMALL_SIZE, colour="quiet")


def symmetric(values: Sequence[Sequence[float]]) -> tuple[tuple[float | None, ...], ...]:
    """Returns a table of distances without its diagonal, which is 0 and would stretch the colours."""
    return tuple(
        tuple(None if row == column else value for column, value in enumerate(each)) for row, each in enumerate(values)
    )
