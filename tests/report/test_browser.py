"""In a browser nothing of a report is cut off, empty or on top of another text, on telephones and on wide screens."""

from dataclasses import replace
from pathlib import Path

import pytest

from refold.report.page import make_sections, render_report
from refold.report.record import ReportRun
from tests.browser import find_browser, look

pytestmark = pytest.mark.long


def test_nothing_overlaps_or_is_cut_off(whole: ReportRun, bare: ReportRun, tmp_path: Path) -> None:
    browser = find_browser()
    long = replace(whole, name="models/" + "very-long-name-" * 9, line="word " * 60, source="x" * 200)
    written = {}
    for name, runs in {"whole": [whole], "bare": [bare], "both": [long, whole, bare]}.items():
        sections, missing = make_sections(runs)
        written[name] = render_report(runs, sections, missing)
    pages = {f"{name} {width}": (f"{name}.html", width) for name in written for width in (390, 1280)}
    # Controls: a text outside of its picture, all ticks at one place, and names that do not break.
    page = written["both"]
    controls = {
        "outside": page.replace(">depths</text>", ' transform="translate(-400 0)">depths</text>'),
        "crowded": page.replace(' text-anchor="middle"', ' text-anchor="middle" dx="-100" textLength="300"'),
        "unbroken": page.replace("overflow-wrap: anywhere", "white-space: nowrap"),
        "empty": page.replace("<rect ", "<g ")
        .replace("</rect>", "</g>")
        .replace("<polyline ", "<g ")
        .replace("<path ", "<g "),
    }
    pages |= {name: (f"{name}.html", 390) for name in controls}
    for name, text in (written | controls).items():
        # The policy of the page would keep the measuring script of the frame around it out.
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
    found = look(browser, tmp_path, pages)
    assert {name: said for name, said in found.items() if said and name not in controls} == {}
    assert "cut off: depths" in found["outside"]
    assert any(each.startswith("overlap: ") for each in found["crowded"])
    assert any(each.startswith("beyond the page") for each in found["unbroken"])
    assert "empty picture" in found["empty"]
