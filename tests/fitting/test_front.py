"""The page has every point with its recipe, needs no network, and shows no text on another or cut off."""

import builtins
import html
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from refold.errors import FolderError
from refold.fitting.front import draw_figure, render_page, write_page
from refold.fitting.pictures import anchor, draw_pictures
from refold.fitting.report import FitReport, FitText, MeasuredLoss, read_report
from tests.browser import find_browser, look
from tests.fitting.conftest import make_report


@pytest.fixture
def browser() -> str:
    return find_browser()


def hard(swept: FitReport) -> FitReport:
    """A report with long names, wide characters, and losses below the noise."""
    tiny = {name: MeasuredLoss(loss=-1e-4, error=1e-4) for name in swept.points[0].measured}
    points = (*swept.points[:-1], swept.points[-1].model_copy(update={"measured": tiny}))
    text = FitText(name="日本語の文章" * 4, weight=1.0, tokens=10)
    return swept.model_copy(update={"source": "models/" + "very-long-name-" * 6, "points": points, "text": (text,)})


def small(swept: FitReport) -> FitReport:
    """A report with tiny losses alone, one of them below the noise."""
    tiny = {name: MeasuredLoss(loss=-1e-5) for name in swept.points[0].measured}
    last = swept.points[-1].model_copy(update={"measured": tiny, "predicted": 1e-5, "singles": ()})
    return swept.model_copy(update={"points": (swept.points[3].model_copy(update={"singles": ()}), last)})


@pytest.mark.long
def test_no_text_overlaps_or_is_cut_off(browser: str, swept: FitReport, tmp_path: Path) -> None:
    page = render_page(hard(swept))
    # Controls: labels on each other, a title outside of its picture, and lines that do not break.
    moved = re.sub(r'(class="name" x=")[\d.]+(" y=")[\d.]+', r"\g<1>200\g<2>100", page)
    outside = page.replace('<text x="2" y="13">', '<text x="-90" y="13">')
    unbroken = page.replace("overflow-wrap: anywhere", "white-space: nowrap")
    crowded = make_report(tuple(0.2 + 0.6 * math.sin(index) ** 2 for index in range(20)), ("bytes", "flops"))
    written = {"page": page, "crowded": render_page(crowded), "small": render_page(small(swept))}
    assert "≤0.0001" in written["small"]
    pages = {f"{name} {width}": (f"{name}.html", width) for name in written for width in (390, 1280)}
    controls = {"moved": moved, "outside": outside, "unbroken": unbroken}
    pages |= {name: (f"{name}.html", 390) for name in controls}
    for name, text in (written | controls).items():
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
    found = look(browser, tmp_path, pages)
    assert {name: said for name, said in found.items() if said and name not in controls} == {}
    assert "overlap: 1 and 2" in found["moved"]
    assert "cut off: nats per token over the source" in found["outside"]
    assert any(each.startswith("beyond the page") for each in found["unbroken"])


def test_the_files_are_a_page_a_picture_and_the_report(fitted: FitReport, tmp_path: Path) -> None:
    paths = write_page(fitted, tmp_path / "out")
    assert [path.name for path in paths] == ["front.html", "front.json", "front.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["front.html", "front.json", "front.png"]
    assert read_report(tmp_path / "out") == fitted
    assert imread(paths[2]).shape[1] > 2 * 600
    with pytest.raises(FolderError, match="a writable place is required"):
        write_page(fitted, paths[0])


def test_every_point_and_every_single_method_opens_its_recipe(swept: FitReport) -> None:
    page = render_page(swept)
    recipes = {
        name: html.unescape(text) for name, text in re.findall(r'<pre id="([^"]+)".*?<code>(.*?)</code>', page, re.S)
    }
    links = set(re.findall(r'href="#([^"]+)"', page))
    expected = {anchor(number): point for number, point in enumerate(swept.points, 1)}
    for number, point in enumerate(swept.points, 1):
        expected |= {anchor(number, single.name): single.made for single in point.singles if single.made}
    assert set(recipes) == links == set(expected)
    for name, made in expected.items():
        assert yaml.safe_load(recipes[name]) == made.recipe, name
    marks = re.findall(r'<a href="#[^"]+" class="[^"]+ mark"', page)
    assert len(marks) == sum(len(picture.marks) for picture in draw_pictures(swept))


def test_the_page_needs_no_network_and_escapes_names(swept: FitReport) -> None:
    page = render_page(swept.model_copy(update={"source": "<script>alert(1)</script>"}))
    assert not re.search(r"<(img|link|iframe)|(src|href)=\"(?!#)|https?://", page)
    assert page.count("<script>") == 1
    assert page.count('<div class="scroll"><table>') == page.count("<table>")


def test_the_tables_have_the_figures(swept: FitReport) -> None:
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", render_page(swept)))
    assert "1: this fit bytes 20% 19.9% 49.9% 69.9% 19.9% +1.000 +1.250 ± 0.14 +1.625 ± 0.14" in page
    assert "int8 at 1 bytes 20% none: at least 53% of the bytes" in page
    assert "bits 158 +0.750 -55.8% - - -" in page
    assert "Runner-up: without width" in page
    assert "No choice goes below 4.1% of the bytes: embedding in int2 4.1%, norms 0.0%" in page
    assert page.count("differ by more than the stated error") == 4


def test_a_report_without_measurements_has_a_page_too(swept: FitReport) -> None:
    points = tuple(point.model_copy(update={"measured": {}, "singles": ()}) for point in swept.points)
    page = render_page(swept.model_copy(update={"points": points, "held_out": ()}))
    assert "Predicted against measured" not in page
    assert page.count('class="fit mark"') == 2 * len(points)
    assert "<h1>" in render_page(swept.model_copy(update={"points": ()}))


def test_the_figure_has_the_pictures_and_marks(swept: FitReport) -> None:
    figure = draw_figure(swept)
    assert [axes.get_title() for axes in figure.axes] == [picture.title for picture in draw_pictures(swept)]
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_label() == "this fit"]
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx([point.loss for point in swept.points])


def test_without_matplotlib_a_line_says_so(swept: FitReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def refuse(name: str, *rest: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(builtins, "__import__", refuse)
    said: list[str] = []
    paths = write_page(swept, tmp_path, said.append)
    assert [path.name for path in paths] == ["front.html", "front.json"]
    assert said == ["front.png is not drawn, because matplotlib is missing; install it, or print front.html"]
