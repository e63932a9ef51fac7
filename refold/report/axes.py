"""Axes: places of values, and ticks at round numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TickForm = Callable[[float], str]
"""Writes a value as the text of a tick."""


@dataclass(frozen=True)
class Scale:
    """An axis from a least to a greatest value, linear or logarithmic, over a span of a drawing.

    Attributes:
        ticks: Values and texts of the ticks.
    """

    least: float
    greatest: float
    is_log: bool
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...] = ()

    def place(self, value: float) -> float:
        """Returns the place of a value; values beyond the axis are placed at its ends."""
        value = min(max(value, self.least), self.greatest)
        if self.is_log:
            share = math.log(value / self.least) / math.log(self.greatest / self.least)
        else:
            share = (value - self.least) / (self.greatest - self.least)
        return self.start + share * (self.end - self.start)


def plain(value: float) -> str:
    """Writes a number with as few digits as it has."""
    return f"{value:,.10g}" if abs(value) >= 1 else f"{value:.4g}"


def short_bytes(value: float) -> str:
    """Writes a number of bytes with a unit of a thousand times another: `12 MB`."""
    return _with_unit(value, ("B", "kB", "MB", "GB", "TB"))


def short_count(value: float) -> str:
    """Writes a count with its suffix: `32k`."""
    return _with_unit(value, ("", "k", "M", "G", "T")).replace(" ", "")


def _with_unit(value: float, units: Sequence[str]) -> str:
    level = 0
    while abs(value) >= 1000 and level < len(units) - 1:
        value, level = value / 1000, level + 1
    return f"{value:.3g} {units[level]}".rstrip()


def linear_scale(values: Sequence[float], start: float, end: float, form: TickForm = plain, most: int = 6) -> Scale:
    """Returns a linear axis around values, with at most `most` ticks at round numbers.

    Args:
        values: The values; at least one.
        start: Place of the least value in the drawing.
        end: Place of the greatest value.
        form: Writes the ticks.
        most: Number of ticks.
    """
    least, greatest = min(values), max(values)
    spare = 0.06 * (greatest - least) or 0.1 * abs(greatest) or 1.0
    low = least - spare if least < 0 or least - spare > 0 else 0.0
    high = greatest + spare
    step = _round_step((high - low) / most)
    first = math.ceil(low / step - 1e-9)
    places = [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]
    return Scale(low, high, False, start, end, tuple((round(each, 12), form(round(each, 12))) for each in places))


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= least * (1 - 1e-9))


def log_scale(values: Sequence[float], start: float, end: float, form: TickForm = plain, most: int = 6) -> Scale:
    """Returns a logarithmic axis around positive values, with ticks at 1, 2 and 5 of each decade or at fewer.

    Values that are not positive are placed at the least value of the axis, whose tick says so.
    """
    positive = [value for value in values if value > 0] or [1.0]
    is_cut = len(positive) < len(values)
    least, greatest = min(positive) / (2.0 if is_cut else 1.15), max(positive) * 1.15
    # A factor of four leaves room for a tick, also around one value alone.
    least, greatest = min(least, greatest / 4), greatest
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(greatest)) + 1)
    ticks: list[float] = []
    for step, factors in ((1, (1, 2, 5)), (1, (1, 3)), (1, (1,)), (2, (1,)), (3, (1,)), (4, (1,))):
        ticks = [factor * 10.0**decade for decade in decades[::step] for factor in factors]
        ticks = [tick for tick in ticks if least * 0.999 <= tick <= greatest * 1.001]
        if len(ticks) <= most:
            break
    written = [(tick, form(tick)) for tick in ticks]
    if is_cut:
        # The lowest tick stands for all values that are not positive; it needs the room of a tick near to it.
        spare = (greatest / least) ** 0.08
        written = [(least, f"≤{form(least)}"), *(each for each in written if each[0] > least * spare)]
    return Scale(least, greatest, True, start, end, tuple(written))


def fitting_scale(values: Sequence[float], start: float, end: float, form: TickForm = plain, most: int = 6) -> Scale:
    """Returns a logarithmic axis if the positive values differ by more than a factor of 12, else a linear one."""
    positive = [value for value in values if value > 0]
    wide = len(positive) > 1 and max(positive) > 12 * min(positive)
    return (log_scale if wide else linear_scale)(values, start, end, form, most)
