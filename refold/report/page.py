"""The report: sections of all runs in one HTML file, with every picture as SVG and PNG in a folder beside it."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from refold.checkpoint.atomic_file import require_free, write_file, write_json, write_text
from refold.errors import FolderError
from refold.pages.render import render_template
from refold.progress import Report
from refold.report import origins, probes, quality, training, weights
from refold.report.drawing import Drawing
from refold.report.png import save_png
from refold.report.record import ReportRun
from refold.report.section import ReportSection, Topic
from refold.report.svg import drawing_rules, inline_svg, svg_file
from refold.version import __version__

GENERATOR = "refold report"
LIST_NAME = "pictures.json"
"""The list of the files that a report wrote into its folder of pictures."""
EVALUATE = "refold evaluate MODEL --out card.json"
TOPICS: tuple[Topic, ...] = (
    Topic(origins.stacks),
    Topic(
        quality.size_and_loss,
        "loss on held-out text",
        "refold evaluate MODEL --data TEXT --against SOURCE --out card.json",
    ),
    Topic(training.healing, "loss curves of healing", "refold heal MODEL OUT --data TEXT --tokens N"),
    Topic(weights.energy, "energy kept by linear and spectra of ties", "refold analyse SOURCE --out DIR --data TEXT"),
    Topic(weights.similarity, "similarity and influence of layers", "refold analyse SOURCE --out DIR --data TEXT"),
    Topic(probes.exits, "quality by exit", f"{EVALUATE} --data TEXT --exits"),
    Topic(probes.recall, "recall by length", f"{EVALUATE} --recall"),
    Topic(probes.tasks, "few-shot tasks", f"{EVALUATE} --tasks seven"),
    Topic(probes.noise, "loss after noise and with branches off", f"{EVALUATE} --data TEXT --noise --branches"),
    Topic(origins.memory),
    Topic(probes.speed, "speed, first token and peak memory", f"{EVALUATE} --against SOURCE --speed"),
    Topic(origins.transfer),
    Topic(origins.history),
)
"""The sections of a report, in their order."""


class MissingTopic(NamedTuple):
    """A quantity that was not measured, and the command that measures it."""

    name: str
    command: str


def make_sections(runs: Sequence[ReportRun]) -> tuple[list[ReportSection], list[MissingTopic]]:
    """Returns the sections that runs have data for, and the things that were not measured."""
    sections, missing = [], []
    for topic in TOPICS:
        section = topic.make(runs)
        if section is not None:
            sections.append(section)
        elif topic.missing:
            missing.append(MissingTopic(topic.missing, _fill(topic.command, runs)))
    return _with_unique_drawings(sections), missing


def _with_unique_drawings(sections: Sequence[ReportSection]) -> list[ReportSection]:
    """Numbers the drawings of equal names, as of models whose names differ in signs or in letters beyond ASCII."""
    found: list[ReportSection] = []
    taken: set[str] = set()
    for section in sections:
        drawings = []
        for drawing in section.drawings:
            names = (drawing.name, *(f"{drawing.name}-{number}" for number in range(2, len(taken) + 3)))
            drawings.append(replace(drawing, name=next(name for name in names if name not in taken)))
            taken.add(drawings[-1].name)
        found.append(replace(section, drawings=tuple(drawings)))
    return found


def _fill(command: str, runs: Sequence[ReportRun]) -> str:
    """Returns a command with the model and the source of the first run that has them."""
    models = [str(model.folder) for run in runs for model in run.models]
    sources = [run.source for run in runs if run.source]
    places = {"MODEL": models[:1], "SOURCE": sources[:1]}
    for word, found in places.items():
        command = re.sub(
            rf"\b{word}\b", lambda _, found=found, word=word: _quoted(found[0]) if found else word, command
        )
    return command


def _quoted(place: str) -> str:
    return f"'{place}'" if re.search(r"[^\w./@+-]", place) else place


def render_report(runs: Sequence[ReportRun], sections: Sequence[ReportSection], missing: Sequence[MissingTopic]) -> str:
    """Returns the page as HTML, which loads nothing and has no script."""
    failed = [
        (each.name, other.section, other.why) for run in runs for each in run.scorecards for other in each.found.not_run
    ]
    return render_template(
        "refold.report",
        "page.html.jinja",
        title=" and ".join(run.name for run in runs[:3]) + (" and others" if len(runs) > 3 else ""),
        runs=runs,
        sections=sections,
        missing=missing,
        failed=failed,
        generator=GENERATOR,
        version=__version__,
        rules=Markup(drawing_rules()),
        draw=lambda drawing: Markup(inline_svg(drawing)),
    )


def write_report(
    runs: Sequence[ReportRun], out: str | Path, *, overwrite: bool = False, progress: Report | None = None
) -> Path:
    """Writes the page of runs, and its pictures as SVG and PNG into a folder beside it with the page's name.

    Args:
        runs: The runs, as `refold.report.opening.open_runs` reads them.
        out: The HTML file.
        overwrite: Replace an older report; other files are never replaced.
        progress: Called with the number of drawn pictures and of all pictures.

    Returns:
        The path of the page.

    Raises:
        FolderError: There is another file at the place of the page or of a picture, or a file cannot be written.
    """
    out = require_free_report(out, overwrite)
    sections, missing = make_sections(runs)
    drawings = [drawing for section in sections for drawing in section.drawings]
    folder = pictures_folder(out)
    own = _own_pictures(folder)
    names = sorted(f"{drawing.name}.{ending}" for drawing in drawings for ending in ("svg", "png"))
    foreign = [name for name in names if (folder / name).exists() and name not in own]
    if foreign:
        raise FolderError(
            f"{folder / foreign[0]}: a free place is required for a picture (it is no file of a report); move it away "
            f"or choose another output"
        )
    # The list is first: a killed report leaves no file that the next one would take for another's.
    write_json(folder / LIST_NAME, {"generator": GENERATOR, "files": sorted({*names, *own})})
    for number, drawing in enumerate(drawings):
        _write_picture(drawing, folder)
        if progress is not None:
            progress(number + 1, len(drawings))
    for name in own - set(names):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / LIST_NAME, {"generator": GENERATOR, "files": names})
    write_text(out, render_report(runs, sections, missing))
    return out


def pictures_folder(out: Path) -> Path:
    """Returns the folder of the pictures of a page."""
    return out.with_suffix("") if out.suffix else out.with_name(f"{out.name}-pictures")


def require_free_report(out: str | Path, overwrite: bool = False) -> Path:
    """Checks that a report can be written to a file, and returns its path.

    Raises:
        FolderError: A file exists that must not be replaced, or the place of the pictures is taken.
    """
    path = require_free(Path(out).expanduser(), "report of `refold report`", is_report, overwrite)
    folder = pictures_folder(path)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FolderError(f"{folder}: a folder for pictures is required (got a file); choose another output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / LIST_NAME).is_file():
        raise FolderError(
            f"{folder}: a new folder, or one of an earlier report, is required for the pictures (it holds other "
            f"files); choose another output"
        )
    return path


def is_report(path: Path) -> bool:
    """Tells whether a file is a report, by its generator."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return f'<meta name="generator" content="{GENERATOR} ' in file.read(2048)
    except OSError:
        return False


def _own_pictures(folder: Path) -> set[str]:
    """Returns the names of the files that an earlier report wrote into a folder."""
    try:
        listed = json.loads((folder / LIST_NAME).read_bytes())
        named = listed["files"] if listed["generator"] == GENERATOR else []
        return {name for name in named if isinstance(name, str) and re.fullmatch(r"[a-z0-9-]+\.(svg|png)", name)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _write_picture(drawing: Drawing, folder: Path) -> None:
    write_text(folder / f"{drawing.name}.svg", svg_file(drawing))
    write_file(folder / f"{drawing.name}.png", lambda unfinished: save_png(drawing, unfinished))
