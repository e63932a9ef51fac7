"""Pictures of a report as data: places of marks, lines, ticks and labels, for SVG in a page and for matplotlib."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from refold.fitting.report import (
    QUANTITY_NAMES,
    FitCandidate,
    FitPoint,
    FitReport,
    MeasuredLoss,
    Quantity,
    mean_divergence,
)
from refold.report.drawing import SHAPES as ALL_SHAPES

WIDTH, HEIGHT = 400.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 14.0, 28.0, 42.0
"""Margins around the plot, in the units of the picture."""
FIT = "fit"
SHAPES = ALL_SHAPES[1:]
"""Shapes of single methods, because no picture relies on colour alone."""
SMALLEST_LOSSES = (1e-3, 1e-4)
"""Losses below the first are drawn at this height, or below the second if all are small: they are noise."""
SMALL = 0.5
"""Greatest loss of a picture that goes down to the second of `SMALLEST_LOSSES`."""
_Box = tuple[float, float, float, float]
CLEAR, TEXT_HEIGHT, DIGIT_WIDTH = 7.0, 16.0, 8.5
"""Radius around a mark that labels avoid, and the size of a label."""


@dataclass(frozen=True)
class Mark:
    """One model in a picture.

    Attributes:
        series: `fit`, or the name of a single method.
        name: Name in tables, such as `2` or `int4 at 2`.
        anchor: Id of the recipe in the page.
        about: Sentence that a page shows when the mark is pointed at.
        x: Value on the horizontal axis.
        y: Value on the vertical axis.
        low: Lowest loss over the held-out texts.
        high: Highest loss over the held-out texts.
    """

    series: str
    name: str
    anchor: str
    about: str
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Tick:
    """A tick of an axis: its place in the picture, and its text."""

    place: float
    text: str


@dataclass(frozen=True)
class Label:
    """The name of a mark beside it, in the units of the picture."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Axis:
    """An axis from a least to a greatest value, linear or logarithmic, over a span of the picture."""

    least: float
    greatest: float
    is_log: bool
    start: float
    end: float

    def place(self, value: float) -> float:
        """Returns the place of a value; values beyond the axis are placed at its ends."""
        value = min(max(value, self.least), self.greatest)
        if self.is_log:
            share = math.log(value / self.least) / math.log(self.greatest / self.least)
        else:
            share = (value - self.least) / (self.greatest - self.least)
        return round(self.start + share * (self.end - self.start), 2)


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: Its id in the page, such as `bytes`.
        title: Its heading.
        across: Title of the horizontal axis.
        up: Title of the vertical axis.
        x_axis: Horizontal axis.
        y_axis: Vertical axis.
        x_ticks: Ticks of the horizontal axis.
        y_ticks: Ticks of the vertical axis.
        marks: Models, those of the fit last, so that they are drawn on top.
        labels: Names of the fit's models that have room.
        is_diagonal: Whether equal values of both axes are joined by a line.
    """

    name: str
    title: str
    across: str
    up: str
    x_axis: Axis
    y_axis: Axis
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    labels: tuple[Label, ...]
    is_diagonal: bool = False

    def lines(self) -> dict[str, list[Mark]]:
        """Returns the marks of each series from left to right."""
        by_series: dict[str, list[Mark]] = {}
        for mark in sorted(self.marks, key=lambda each: (each.x, each.y)):
            by_series.setdefault(mark.series, []).append(mark)
        return by_series


def anchor(*parts: int | str) -> str:
    """Returns the id of a recipe in the page: `recipe-2`, or `recipe-2-int4` for a single method."""
    words = ["recipe", *("".join(c if c.isalnum() else "-" for c in str(part)) for part in parts)]
    return "-".join(words)


def draw_pictures(found: FitReport) -> tuple[Picture, ...]:
    """Returns the pictures of a report: loss against each limited quantity, and predictions against measurements."""
    fronts = [_front(found, quantity) for quantity in found.limited]
    checked = [point for point in found.points if point.predicted is not None and point.measured]
    return (*(each for each in fronts if each.marks), *([_check(checked)] if checked else []))


def method_names(found: FitReport) -> tuple[str, ...]:
    """Returns the names of all single methods, in the order of their first mention."""
    return tuple(dict.fromkeys(single.name for point in found.points for single in point.singles))


def _front(found: FitReport, quantity: Quantity) -> Picture:
    marks = [*_single_marks(found, quantity), *_fit_marks(found, quantity)]
    x_axis, x_ticks = _linear([mark.x for mark in marks], LEFT, WIDTH - RIGHT)
    y_axis, y_ticks = _logarithmic([value for mark in marks for value in (mark.low, mark.high)], HEIGHT - BOTTOM, TOP)
    at = f" at {found.context:,} tokens" if quantity != "bytes" else ""
    name = QUANTITY_NAMES[quantity]
    return Picture(
        name=quantity,
        title=f"Loss against {name}",
        across=f"{name}{at}, share of the source's",
        up="nats per token over the source",
        x_axis=x_axis,
        y_axis=y_axis,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        marks=tuple(marks),
        labels=_place_labels(marks, x_axis, y_axis),
    )


def _fit_marks(found: FitReport, quantity: Quantity) -> Iterator[Mark]:
    for number, point in enumerate(found.points, 1):
        names = (FIT, str(number), anchor(number), found.budget_names[number - 1])
        yield from _mark(found, quantity, point, names)


def _single_marks(found: FitReport, quantity: Quantity) -> Iterator[Mark]:
    """Yields a mark for each single method of each budget, once where several budgets have the same model."""
    seen = set()
    for number, point in enumerate(found.points, 1):
        for single in point.singles:
            if single.made is None:
                continue
            key = (single.name, single.made.costs.share(quantity, found.source_costs), single.made.loss)
            if key not in seen:
                seen.add(key)
                names = (
                    single.name,
                    f"{single.name} at {number}",
                    anchor(number, single.name),
                    found.budget_names[number - 1],
                )
                yield from _mark(found, quantity, single.made, names)


def _mark(found: FitReport, quantity: Quantity, made: FitCandidate, names: tuple[str, str, str, str]) -> Iterator[Mark]:
    # A model without a time was measured without the table of the device.
    if made.loss is None or (quantity == "milliseconds" and not made.costs.milliseconds):
        return
    series, name, place, budget = names
    x = made.costs.share(quantity, found.source_costs)
    each = [loss.loss for loss in made.losses.values()] or [made.loss]
    told = (
        ", ".join(f"{loss.loss:+.3g} on {text}" for text, loss in made.losses.items()) or f"{made.loss:+.3g} predicted"
    )
    about = f"{name} ({budget}): {x:.1%} of the {QUANTITY_NAMES[quantity]}, {told}"
    yield Mark(series, name, place, about, x, made.loss, min(each), max(each))


def _check(points: Sequence[FitPoint]) -> Picture:
    marks = []
    for number, point in enumerate(points, 1):
        measured = mean_divergence(point.measured)
        about = f"{number} ({point.budget.text}): predicted {point.predicted:+.3g}, measured {measured:+.3g}"
        marks.append(
            Mark(FIT, str(number), anchor(number), about, point.predicted or 0.0, measured, *_span(point.measured))
        )
    values = [value for mark in marks for value in (mark.x, mark.low, mark.high)]
    x_axis, x_ticks = _logarithmic(values, LEFT, WIDTH - RIGHT)
    y_axis, y_ticks = _logarithmic(values, HEIGHT - BOTTOM, TOP)
    return Picture(
        name="check",
        title="Predicted against measured",
        across="predicted nats per token, before healing",
        up="measured divergence, nats per token",
        x_axis=x_axis,
        y_axis=y_axis,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        marks=tuple(marks),
        labels=_place_labels(marks, x_axis, y_axis),
        is_diagonal=True,
    )


def _span(losses: dict[str, MeasuredLoss]) -> tuple[float, float]:
    """Returns the least and the largest divergence of all texts."""
    found = [each.loss if each.divergence is None else each.divergence for each in losses.values()]
    return min(found), max(found)


def _linear(values: Sequence[float], start: float, end: float) -> tuple[Axis, tuple[Tick, ...]]:
    """Returns a linear axis of shares around the values, with ticks at round percentages."""
    least, greatest = min(values, default=0.0), max(values, default=1.0)
    spare = max(0.06 * (greatest - least), 0.01)
    axis = Axis(max(0.0, least - spare), greatest + spare, False, start, end)
    span = axis.greatest - axis.least
    step = next(each for each in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 1e9) if span / each <= 7)
    first = math.ceil(axis.least / step - 1e-9)
    shares = [round(index * step, 6) for index in range(first, math.floor(axis.greatest / step + 1e-9) + 1)]
    digits = 1 if step < 0.01 else 0
    return axis, tuple(Tick(axis.place(share), f"{share:.{digits}%}") for share in shares)


def _logarithmic(values: Sequence[float], start: float, end: float) -> tuple[Axis, tuple[Tick, ...]]:
    """Returns a logarithmic axis of losses with ticks at 1, 2 and 5 of each decade, or at 1 where there are many."""
    greatest = max(values, default=1.0)
    smallest = SMALLEST_LOSSES[greatest < SMALL]
    greatest = max(greatest, 5 * smallest)
    least = max(smallest, min(values, default=smallest))
    is_cut = any(value < smallest for value in values)
    # A factor of four between the ends leaves room for a tick, also for one loss alone.
    least, greatest = (least if is_cut else least / 1.3), max(1.3 * greatest, 4 * least / 1.3)
    axis = Axis(least, greatest, True, start, end)
    decades = range(math.floor(math.log10(axis.least)), math.ceil(math.log10(axis.greatest)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        losses = [factor * 10.0**decade for decade in decades for factor in factors]
        losses = [loss for loss in losses if axis.least * 0.999 <= loss <= axis.greatest]
        # Texts lie side by side on a horizontal axis, and above each other on a vertical one.
        if len(losses) <= (5 if end > start else 7):
            break
    ticks = [Tick(axis.place(loss), f"{loss:g}") for loss in losses]
    if is_cut:
        ticks[0] = Tick(ticks[0].place, f"≤{losses[0]:g}")
    return axis, tuple(ticks)


def _place_labels(marks: Sequence[Mark], x_axis: Axis, y_axis: Axis) -> tuple[Label, ...]:
    """Returns the names of the fit's marks beside them, without those that would lie on a mark or another name."""
    places = [(x_axis.place(mark.x), y_axis.place(mark.y)) for mark in marks]
    taken = [(x - CLEAR, y - CLEAR, x + CLEAR, y + CLEAR) for x, y in places]
    labels = []
    for mark, (x, y) in zip(marks, places, strict=True):
        if mark.series != FIT:
            continue
        box = _free_box(x, y, DIGIT_WIDTH * len(mark.name) + 2, taken)
        if box is not None:
            taken.append(box)
            labels.append(Label(round((box[0] + box[2]) / 2, 2), round(box[3] - 4.5, 2), mark.name))
    return tuple(labels)


_AROUND: tuple[tuple[float, float], ...] = ((1, -1), (-1, -1), (1, 1), (-1, 1), (0, -1), (0, 1), (1, 0), (-1, 0))


def _free_box(x: float, y: float, width: float, taken: Sequence[_Box]) -> _Box | None:
    for distance in (CLEAR, CLEAR + 7):
        for across, up in _AROUND:
            middle_x, middle_y = x + across * (distance + width / 2), y + up * (distance + TEXT_HEIGHT / 2)
            box = (middle_x - width / 2, middle_y - TEXT_HEIGHT / 2, middle_x + width / 2, middle_y + TEXT_HEIGHT / 2)
            is_inside = box[0] > LEFT and box[2] < WIDTH - 2 and box[1] > 2 and box[3] < HEIGHT - BOTTOM
            if is_inside and not any(map(_meets(box), taken)):
                return box
    return None


def _meets(one: _Box) -> Callable[[_Box], bool]:
    return lambda two: one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]
