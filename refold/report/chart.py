"""Charts of series over two axes: points with error bars, lines, a legend."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from refold.pages.palette import SERIES
from refold.report.axes import Scale, TickForm, fitting_scale, linear_scale, log_scale, plain
from refold.report.drawing import (
    DASHES,
    SHAPES,
    SMALL_SIZE,
    TEXT_SIZE,
    Drawing,
    Item,
    Marker,
    MarkShape,
    Stroke,
    Words,
    shorten,
    text_width,
)

WIDTH, PLOT_HEIGHT = 420.0, 210.0
RIGHT, TOP, TICKS, ROW = 14.0, 44.0, 38.0, 17.0
MOST_MARKED = 30
"""Number of points of a series up to which each has a mark."""


@dataclass(frozen=True)
class PlotPoint:
    """A point of a series, with the ends of its error bar, if it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    tip: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one name. `is_joined`: a line joins them; `is_source`: in the colour of the text."""

    name: str
    points: tuple[PlotPoint, ...]
    is_joined: bool = True
    is_source: bool = False


@dataclass(frozen=True)
class ChartAxis:
    """The title of an axis and the way that its ticks are written; `is_log` None: by the values."""

    title: str
    form: TickForm = plain
    is_log: bool | None = None

    def scale(self, values: Sequence[float], start: float, end: float, most: int) -> Scale:
        """Returns the scale for values."""
        make = fitting_scale if self.is_log is None else (log_scale if self.is_log else linear_scale)
        return make(values, start, end, self.form, most)


@dataclass(frozen=True)
class ChartText:
    """Name, title and description of a drawing."""

    name: str
    title: str
    about: str


def draw_chart(text: ChartText, across: ChartAxis, up: ChartAxis, series: Sequence[Series]) -> Drawing:
    """Draws a chart.

    Args:
        text: Name, title and description.
        across: The horizontal axis.
        up: The vertical axis.
        series: At least one series with a point.
    """
    points = [point for each in series for point in each.points]
    heights = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    bottom = TOP + PLOT_HEIGHT
    y_scale = up.scale(heights, bottom, TOP, 6)
    left = 12 + max((text_width(tick, SMALL_SIZE) for _, tick in y_scale.ticks), default=20.0)
    x_scale = across.scale([point.x for point in points], left, WIDTH - RIGHT, 5)
    items: list[Item] = [heading(text, WIDTH)]
    items.append(Words(2.0, 33.0, shorten(up.title, WIDTH - 4, SMALL_SIZE), SMALL_SIZE, colour="quiet"))
    items += _frame(x_scale, y_scale, across.title)
    for number, each in enumerate(series):
        items += _series(each, number, x_scale, y_scale)
    legend, height = _legend(series, bottom + TICKS)
    return Drawing(text.name, text.title, text.about, WIDTH, height, (*items, *legend))


def heading(text: ChartText, width: float) -> Words:
    """Returns the title at the top of a drawing."""
    return Words(2.0, 15.0, shorten(text.title, width - 4, TEXT_SIZE + 1), TEXT_SIZE + 1)


def ticks_across(scale: Scale, top: float, bottom: float, zero: str = "faint") -> Iterator[Item]:
    """Yields the lines of a horizontal axis, that of 0 in a colour of its own, and the texts that have room below."""
    free = 0.0
    for value, tick in scale.ticks:
        place, half = scale.place(value), text_width(tick, SMALL_SIZE) / 2
        yield Stroke(((place, top), (place, bottom)), zero if value == 0 else "faint")
        # A text that would lie on its neighbour or beyond the picture is dropped; its line stays.
        if place - half > free and place + half < WIDTH - 1:
            yield Words(place, bottom + 14, tick, SMALL_SIZE, "middle")
            free = place + half + 5


def style_of(number: int) -> tuple[str, MarkShape, tuple[float, ...]]:
    """Returns colour, shape and dashes of a series by its number; no two of 42 have colour and shape in common."""
    around, place = divmod(number, len(SERIES))
    return SERIES[place], SHAPES[(place + around) % len(SHAPES)], DASHES[place % len(DASHES)]


def _look(each: Series, number: int) -> tuple[str, MarkShape, tuple[float, ...]]:
    # Several sources differ by shape and dashes.
    return ("ink", *style_of(number)[1:]) if each.is_source else style_of(number)


def _frame(x_scale: Scale, y_scale: Scale, title: str) -> Iterator[Item]:
    left, right, bottom, top = x_scale.start, x_scale.end, y_scale.start, y_scale.end
    for value, tick in y_scale.ticks:
        place = y_scale.place(value)
        yield Stroke(((left, place), (right, place)), "faint")
        yield Words(left - 6, place + 3.5, tick, SMALL_SIZE, "end")
    yield from ticks_across(x_scale, top, bottom)
    yield Stroke(((left, top), (left, bottom), (right, bottom)), "ink")
    yield Words(
        (left + right) / 2, bottom + 29, shorten(title, right - left, SMALL_SIZE), SMALL_SIZE, "middle", "quiet"
    )


def _series(each: Series, number: int, x_scale: Scale, y_scale: Scale) -> Iterator[Item]:
    colour, shape, dash = _look(each, number)
    places = [(x_scale.place(point.x), y_scale.place(point.y)) for point in each.points]
    if each.is_joined and len(places) > 1:
        yield Stroke(tuple(places), colour, 1.8, dash)
    for point, (x, y) in zip(each.points, places, strict=True):
        if point.low is not None and point.high is not None:
            low, high = y_scale.place(point.low), y_scale.place(point.high)
            yield Stroke(((x, low), (x, high)), colour, 1.2)
            for end in (low, high):
                yield Stroke(((x - 3, end), (x + 3, end)), colour, 1.2)
        if len(places) <= MOST_MARKED or not each.is_joined:
            yield Marker(x, y, shape, colour, point.tip)


def _legend(series: Sequence[Series], top: float) -> tuple[list[Item], float]:
    """Returns the legend below a plot, and the height of the drawing."""
    items: list[Item] = []
    x, y = 10.0, top + 12
    for number, each in enumerate(series):
        colour, shape, dash = _look(each, number)
        name = shorten(each.name, WIDTH - 50, SMALL_SIZE)
        needed = 26 + text_width(name, SMALL_SIZE)
        if x > 10 and x + needed > WIDTH - 6:
            x, y = 10.0, y + ROW
        if each.is_joined:
            items.append(Stroke(((x - 6, y), (x + 12, y)), colour, 1.8, dash))
        items += [Marker(x + 3, y, shape, colour), Words(x + 16, y + 3.5, name, SMALL_SIZE)]
        x += needed + 10
    return items, y + 12
