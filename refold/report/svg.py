"""Drawings as SVG: inside of a page, whose style sheet has the colours, or as a file of its own."""

from collections.abc import Callable
from itertools import chain
from xml.sax.saxutils import escape, quoteattr

from refold.pages.palette import LIGHT
from refold.report.drawing import OUTLINES, Box, Drawing, Item, Marker, Stroke, Words

FONT = "system-ui, sans-serif"


def inline_svg(drawing: Drawing) -> str:
    """Returns a drawing as an `svg` element, with title and description for screen readers."""
    place = f"picture-{drawing.name}"
    lines = [
        f'<svg class="drawing" viewBox="0 0 {_number(drawing.width)} {_number(drawing.height)}" role="img" '
        f'aria-labelledby="{place}-title {place}-about">',
        f'<title id="{place}-title">{escape(drawing.title)}</title>',
        f'<desc id="{place}-about">{escape(drawing.about)}</desc>',
        *map(_item, drawing.items),
        "</svg>",
    ]
    return "\n".join(lines)


def svg_file(drawing: Drawing) -> str:
    """Returns a drawing as the text of an SVG file, in light colours on paper."""
    size = f'width="{_number(drawing.width)}" height="{_number(drawing.height)}"'
    inner = inline_svg(drawing).replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" {size} ', 1)
    head, rest = inner.split(">\n", 1)
    paper = f'<rect {size} class="f-paper"/>'
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n{head}>\n<style>{drawing_rules(_literal)}</style>\n{paper}\n{rest}\n'
    )


def drawing_rules(colour: Callable[[str], str] = lambda role: f"var(--{role})") -> str:
    """Returns the style rules of drawings: a class for each colour as fill and as line.

    Args:
        colour: Returns the CSS colour of a role; a variable of the page's style sheet if not given.
    """
    text = f".drawing text {{ font-family: {FONT}; }}"
    fills = (f".drawing .f-{role} {{ fill: {colour(role)}; }}" for role in LIGHT)
    lines = (f".drawing .s-{role} {{ stroke: {colour(role)}; }}" for role in LIGHT)
    return " ".join(chain((text,), fills, lines))


def _literal(role: str) -> str:
    return LIGHT[role]


def _item(item: Item) -> str:
    if isinstance(item, Stroke):
        points = " ".join(f"{_number(x)},{_number(y)}" for x, y in item.points)
        return f'<polyline points="{points}"{_paint(None, item.colour)}{_line(item.width, item.dash)}/>'
    if isinstance(item, Box):
        place = f'x="{_number(item.x)}" y="{_number(item.y)}"'
        size = f'width="{_number(item.width)}" height="{_number(item.height)}"'
        style = _paint(item.fill, item.edge) + (_line(1.0, item.dash) if item.edge else "")
        return f"<rect {place} {size}{style}>{_tip(item.tip)}</rect>"
    if isinstance(item, Words):
        turn = f' transform="rotate(-90 {_number(item.x)} {_number(item.y)})"' if item.is_turned else ""
        anchor = "" if item.anchor == "start" else f' text-anchor="{item.anchor}"'
        place = f'x="{_number(item.x)}" y="{_number(item.y)}" font-size="{_number(item.size)}"'
        return f"<text {place}{anchor}{_paint(item.colour)}{turn}>{escape(item.text)}</text>"
    return _marker(item)


def _marker(item: Marker) -> str:
    place = f"translate({_number(item.x)} {_number(item.y)})"
    return f'<path d="{OUTLINES[item.shape]}" transform="{place}"{_paint(item.colour)}>{_tip(item.tip)}</path>'


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _paint(fill: str | None, edge: str | None = None) -> str:
    """Returns the attributes of fill and edge: classes for roles, attributes for literal colours."""
    given = {"fill": fill, "stroke": edge}
    roles = [f"{name[0]}-{each}" for name, each in given.items() if each and not each.startswith("#")]
    literal = [f" {name}={quoteattr(each)}" for name, each in given.items() if each and each.startswith("#")]
    none = ' fill="none"' if fill is None else ""
    return none + (f' class="{" ".join(roles)}"' if roles else "") + "".join(literal)


def _line(width: float, dash: tuple[float, ...]) -> str:
    dashes = f' stroke-dasharray="{" ".join(map(_number, dash))}"' if dash else ""
    return f' stroke-width="{_number(width)}"{dashes}'


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
