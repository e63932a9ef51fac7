"""Drawings as PNG, by matplotlib, in light colours: one unit is one point."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from refold.pages.palette import LIGHT
from refold.report.drawing import MARKERS, Box, Drawing, Item, Marker, Stroke, Words

DOTS_PER_INCH = 160
POINTS_PER_INCH = 72
NARROWER = 0.92
"""matplotlib's font is wider than those of browsers."""


def draw_figure(drawing: Drawing) -> Figure:
    """Draws a drawing with matplotlib."""
    # Without pyplot, which would need a window system and keep figures in memory.
    figure = Figure(
        figsize=(drawing.width / POINTS_PER_INCH, drawing.height / POINTS_PER_INCH), facecolor=LIGHT["paper"]
    )
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, 0)
    for level, item in enumerate(drawing.items, 2):
        _draw(axes, item, level)
    return figure


def save_png(drawing: Drawing, path: Path) -> None:
    """Saves a drawing as a PNG file.

    Raises:
        OSError: The disk is full or failed.
    """
    draw_figure(drawing).savefig(path, format="png", dpi=DOTS_PER_INCH, metadata={"Title": drawing.title})


def _draw(axes: Any, item: Item, level: int) -> None:
    if isinstance(item, Stroke):
        across, up = zip(*item.points, strict=True)
        style = (0, item.dash) if item.dash else "solid"
        axes.plot(across, up, color=_colour(item.colour), linewidth=item.width, linestyle=style, zorder=level)
    elif isinstance(item, Box):
        look: dict[str, Any] = {"facecolor": _colour(item.fill), "edgecolor": _colour(item.edge)}
        look |= {"linewidth": 1.0 if item.edge else 0.0, "linestyle": (0, item.dash) if item.dash else "solid"}
        axes.add_patch(Rectangle((item.x, item.y), item.width, item.height, zorder=level, **look))
    elif isinstance(item, Words):
        axes.text(
            item.x,
            item.y,
            # matplotlib would read text between dollar signs as mathematics.
            item.text.replace("$", r"\$"),
            fontsize=item.size * NARROWER,
            ha={"start": "left", "middle": "center", "end": "right"}[item.anchor],
            va="baseline",
            rotation=90 if item.is_turned else 0,
            rotation_mode="anchor",
            color=_colour(item.colour),
            zorder=level,
        )
    else:
        _mark(axes, item, level)


def _mark(axes: Any, item: Marker, level: int) -> None:
    axes.plot(
        item.x, item.y, MARKERS[item.shape], color=_colour(item.colour), markersize=9, markeredgewidth=0, zorder=level
    )


def _colour(role: str | None) -> str:
    return "none" if role is None else LIGHT.get(role, role)
