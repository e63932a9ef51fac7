"""A picture as data: lines, boxes, words and marks, from which the SVG and the PNG are rendered alike.

A unit is a CSS pixel in a page at full size, and a point in a PNG. The origin is the upper left corner.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Anchor = Literal["start", "middle", "end"]
MarkShape = Literal["circle", "square", "triangle", "diamond", "down", "plus", "cross"]
SHAPES: tuple[MarkShape, ...] = ("circle", "square", "triangle", "diamond", "down", "plus", "cross")
OUTLINES: Mapping[MarkShape, str] = {
    "circle": "M0-5A5 5 0 1 1 0 5A5 5 0 1 1 0-5z",
    "square": "M-4.5-4.5h9v9h-9z",
    "triangle": "M0-5.5L5.5 4.5h-11z",
    "diamond": "M0-6L6 0 0 6-6 0z",
    "down": "M0 5.5L5.5-4.5h-11z",
    "plus": "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    "cross": "M-3-6L0-3 3-6 6-3 3 0 6 3 3 6 0 3-3 6-6 3-3 0-6-3z",
}
"""SVG path of each shape around its middle."""
MARKERS: Mapping[MarkShape, str] = {
    "circle": "o",
    "square": "s",
    "triangle": "^",
    "diamond": "D",
    "down": "v",
    "plus": "P",
    "cross": "X",
}
"""matplotlib's marker of each shape."""
DASHES: tuple[tuple[float, ...], ...] = ((), (6.0, 3.0), (2.0, 3.0), (8.0, 3.0, 2.0, 3.0), (4.0, 2.0), (1.0, 2.0))
"""Dash patterns of series, so that no picture relies on colour alone."""
TEXT_SIZE, SMALL_SIZE = 12.0, 10.0
WIDTH_OF_A_LETTER = 0.6
"""Width of a letter as a share of the text size: more than the mean of common fonts."""


@dataclass(frozen=True)
class Stroke:
    """A line through points. Colours are roles of `refold.pages.palette`, or `#rrggbb`."""

    points: tuple[tuple[float, float], ...]
    colour: str = "ink"
    width: float = 1.0
    dash: tuple[float, ...] = ()


@dataclass(frozen=True)
class Box:
    """A rectangle with its tip: the text that a page shows when it is pointed at."""

    x: float
    y: float
    width: float
    height: float
    fill: str | None = None
    edge: str | None = None
    dash: tuple[float, ...] = ()
    tip: str = ""


@dataclass(frozen=True)
class Words:
    """A line of text; `y` is its base line. `is_turned`: it reads from bottom to top."""

    x: float
    y: float
    text: str
    size: float = TEXT_SIZE
    anchor: Anchor = "start"
    colour: str = "ink"
    is_turned: bool = False


@dataclass(frozen=True)
class Marker:
    """A mark of one of `SHAPES` with its tip."""

    x: float
    y: float
    shape: MarkShape = "circle"
    colour: str = "ink"
    tip: str = ""


Item = Stroke | Box | Words | Marker


@dataclass(frozen=True)
class Drawing:
    """A picture.

    Attributes:
        name: Name of its files, unique in a report.
        title: Title.
        about: Content in one or two sentences, for readers who do not see it.
        width: Width.
        height: Height.
        items: Contents, the lowest first.
    """

    name: str
    title: str
    about: str
    width: float
    height: float
    items: tuple[Item, ...]


def text_width(text: str, size: float = TEXT_SIZE) -> float:
    """Returns an upper estimate of the width of a line of text."""
    wide = sum(1.0 if ord(letter) < 0x1100 else 1.8 for letter in text)
    return WIDTH_OF_A_LETTER * size * wide


def shorten(text: str, width: float, size: float = TEXT_SIZE) -> str:
    """Returns a text that fits into a width: its middle becomes an ellipsis."""
    text = " ".join(text.split())
    if text_width(text, size) <= width:
        return text
    kept = len(text)
    while kept > 2:
        kept -= 1
        head = (kept + 1) // 2
        short = f"{text[:head].rstrip()}…{text[len(text) - kept + head :].lstrip()}"
        if text_width(short, size) <= width:
            return short
    return "…"
