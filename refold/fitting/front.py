"""The page of a fit: pictures, tables and recipes in one HTML file, the pictures as PNG, and the report as JSON."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from refold.checkpoint.atomic_file import write_file, write_json, write_text
from refold.fitting.pictures import FIT, HEIGHT, SHAPES, WIDTH, Picture, anchor, draw_pictures, method_names
from refold.fitting.report import QUANTITY_NAMES, REPORT_NAME, STATED_NATS, STATED_RATIO, FitReport, mean_divergence
from refold.pages.palette import LIGHT, SERIES
from refold.pages.render import render_template
from refold.progress import Say
from refold.report.drawing import MARKERS, OUTLINES, MarkShape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIT_NAME = "this fit"
MOST_ACROSS = 3
"""Number of pictures side by side in the PNG."""
PAGE_NAME, FIGURE_NAME = "front.html", "front.png"
COLOURS = tuple(LIGHT[role] for role in SERIES)
"""Colours of single methods in the PNG, those of the page on paper."""


def write_page(found: FitReport, folder: str | Path, say: Say = lambda text: None) -> tuple[Path, ...]:
    """Writes `front.html`, `front.json` and `front.png` into a folder, each atomically, and returns their paths.

    The page needs no network: style, pictures and the script of its copy buttons are inside. Without matplotlib
    there is no PNG, and a line says so.

    Args:
        found: The report of a fit or a sweep.
        folder: Made if it is missing. Files of these names are replaced.
        say: Prints a line.

    Raises:
        FolderError: The folder cannot be written.
    """
    folder = Path(folder)
    paths = [folder / PAGE_NAME, folder / REPORT_NAME]
    write_text(paths[0], render_page(found))
    write_json(paths[1], found.model_dump(mode="json"))
    try:
        figure = draw_figure(found)
    except ImportError:
        say(f"{FIGURE_NAME} is not drawn, because matplotlib is missing; install it, or print {PAGE_NAME}")
        return tuple(paths)
    write_file(folder / FIGURE_NAME, lambda unfinished: figure.savefig(unfinished, format="png", dpi=150))
    return (*paths, folder / FIGURE_NAME)


def render_page(found: FitReport) -> str:
    """Returns the page as HTML."""
    methods = method_names(found)
    return render_template(
        "refold.fitting",
        "front.html.jinja",
        found=found,
        pictures=draw_pictures(found),
        methods=methods,
        styles={FIT: ("circle", None), **{name: _style(number) for number, name in enumerate(methods)}},
        fit=FIT,
        outlines=OUTLINES,
        width=WIDTH,
        height=HEIGHT,
        quantities=QUANTITY_NAMES,
        shown=[name for name in QUANTITY_NAMES if getattr(found.source_costs, name)],
        texts=[each.name for each in found.held_out],
        anchor=anchor,
        mean_divergence=mean_divergence,
        stated=(STATED_RATIO, STATED_NATS),
    )


def draw_figure(found: FitReport) -> "Figure":
    """Draws the pictures of a report side by side.

    Raises:
        ImportError: matplotlib is missing.
    """
    # Imported here, because only this function needs it.
    from matplotlib.figure import Figure

    pictures, methods = draw_pictures(found), method_names(found)
    across = max(1, min(MOST_ACROSS, len(pictures)))
    down = max(1, -(-len(pictures) // across))
    figure = Figure(figsize=(5.4 * across, 4.0 * down + 0.6), layout="constrained")
    places = figure.subplots(down, across, squeeze=False).flat
    for axes, picture in itertools.zip_longest(places, pictures):
        if picture is None:
            axes.set_axis_off()
        else:
            _draw(axes, picture, methods)
    keys = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    order = [name for name in (FIT_NAME, *methods) if name in keys]
    figure.legend([keys[name] for name in order], order, loc="outside lower center", ncols=min(8, 4 * across))
    return figure


def _draw(axes: "Axes", picture: Picture, methods: tuple[str, ...]) -> None:
    styles = {name: _style(number) for number, name in enumerate(methods)}
    floor = picture.y_axis.least
    if picture.is_diagonal:
        ends = (picture.x_axis.least, picture.x_axis.greatest)
        axes.plot(ends, ends, color="#888888", linestyle="--", linewidth=1)
    for series, marks in picture.lines().items():
        shape, number = styles.get(series, ("circle", None))
        colour = "#000000" if number is None else COLOURS[number]
        across = [max(mark.x, picture.x_axis.least) for mark in marks]
        up = [max(mark.y, floor) for mark in marks]
        style = {"marker": MARKERS[shape], "color": colour, "markersize": 6}
        if series == FIT:
            style |= {"label": FIT_NAME, "zorder": 3, "linestyle": "none" if picture.is_diagonal else "-"}
        else:
            style |= {"label": series, "linestyle": "none"}
        axes.plot(across, up, **style)
        for mark, x in zip(marks, across, strict=True):
            axes.plot((x, x), (max(mark.low, floor), max(mark.high, floor)), color=colour, linewidth=1)
    _write_labels(axes, picture)
    axes.set_yscale("log")
    axes.set_ylim(floor, picture.y_axis.greatest)
    axes.set_xscale("log" if picture.x_axis.is_log else "linear")
    axes.set_xlim(picture.x_axis.least, picture.x_axis.greatest)
    if picture.x_axis.is_log:
        axes.xaxis.set_major_formatter(lambda loss, place: f"{loss:g}")
    else:
        axes.xaxis.set_major_formatter(lambda share, place: f"{round(100 * share, 1):g}%")
    axes.yaxis.set_major_formatter(lambda loss, place: f"{loss:g}")
    for axis in (axes.xaxis, axes.yaxis):
        # Labels between the powers of ten overlap.
        axis.set_minor_formatter(lambda value, place: "")
    axes.set_xlabel(picture.across)
    axes.set_ylabel(picture.up)
    axes.set_title(picture.title)


def _write_labels(axes: "Axes", picture: Picture) -> None:
    """Writes the names of the fit's marks on the same side of them as in the page."""
    marks = {mark.name: mark for mark in picture.marks if mark.series == FIT}
    for label in picture.labels:
        mark = marks[label.text]
        right = label.x - picture.x_axis.place(mark.x)
        up = picture.y_axis.place(mark.y) - (label.y - 4)
        at = (max(mark.x, picture.x_axis.least), max(mark.y, picture.y_axis.least))
        style = {"textcoords": "offset points", "fontsize": 8, "ha": "center", "va": "center"}
        axes.annotate(label.text, at, (0.8 * right, 0.8 * up), **style)


def _style(number: int) -> tuple[MarkShape, int]:
    """Returns the shape and the number of the colour of a single method; no two of 36 have both in common."""
    return SHAPES[(number + number // len(COLOURS)) % len(SHAPES)], number % len(COLOURS)
