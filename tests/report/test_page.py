"""A page shows the figures of its records, escapes names, loads nothing, and replaces only files of its own."""

import html
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from refold.errors import FolderError
from refold.evaluation.result import Evaluation
from refold.report.page import TOPICS, make_sections, render_report, write_report
from refold.report.png import draw_figure
from refold.report.record import ReportRun
from refold.report.svg import svg_file
from tests.report.conftest import NASTY


def render(*runs: ReportRun) -> str:
    sections, missing = make_sections(runs)
    return render_report(runs, sections, missing)


class Reader(HTMLParser):
    """Collects tables by caption, ids, and addresses that a browser would load."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: dict[str, list[list[str]]] = {}
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.names: set[str] = set()
        self._into: str | None = None
        self._caption = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        for name, value in attrs:
            self.ids += [value or ""] if name == "id" else []
            self.addresses += [value or ""] if name in ("href", "src", "srcset", "xlink:href", "action", "data") else []
        if tag == "caption":
            self._caption, self._into = "", "caption"
        elif tag == "tr":
            self.tables[self._caption].append([])
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append("")
            self._into = "cell"

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self.tables[self._caption] = []
        if tag in ("caption", "td", "th"):
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._into == "caption":
            self._caption += data
        elif self._into == "cell":
            self.tables[self._caption][-1][-1] += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def test_every_number_of_the_tables_is_that_of_the_record(whole: ReportRun) -> None:
    tables = read(render(whole)).tables
    points = {row[0]: row[1:] for row in tables["Size and loss on held out.txt"][1:]}
    wanted = {("source source" if point.is_source else point.name): point for point in whole.points}
    assert points.keys() == wanted.keys()
    for name, (size, loss) in points.items():
        assert float(size.replace(",", "")) == wanted[name].bytes
        assert float(loss.split(" ")[0]) == pytest.approx(wanted[name].loss, abs=5e-5)
        assert (wanted[name].error is None) == ("±" not in loss)
    model = whole.models[0]
    costs = {row[0]: row[1:] for row in tables[f"{NASTY}: costs"][1:]}
    assert costs["weight bytes"][:2] == [f"{model.cost.source.weight_bytes:,}", f"{model.cost.target.weight_bytes:,}"]
    memory = tables["Bytes of weights, cache and state"]
    assert memory[0][2] == "2,048 tokens"
    assert [row[2] for row in memory[1:]] == [
        f"{each.memory_bytes(2048):,}" for each in (model.cost.source, model.cost.target)
    ]
    card = whole.scorecards[0].found
    assert card.recall is not None
    assert card.tasks is not None
    shown = [row[3] for row in tables["Recall: passkey"][1:4]]
    assert shown == [f"{each.accuracy:.3f} ± 0.030" for each in card.recall.scores if each.kind == "passkey"]
    assert [row[3] for row in tables["Few-shot tasks"][1:3]] == ["0.6100 ± 0.0200", "0.4300 ± 0.0200"]
    assert tables["Few-shot tasks"][5][3] == "0.5200 ± 0.0140"
    assert tables[f"{NASTY}: all tokens at one exit"][1][1:3] == ["1.7700", "7.000"]
    assert [row[2] for row in tables[f"{NASTY}: rules for leaving"][1:]] == ["1.9000", "1.3000", "1.4400", "1.4000"]
    assert tables["After noisy text"][1][3] == "0.3000"
    assert tables["Branches off"][1][3] == "0.6000 ± 0.0100"
    assert tables["Speed and memory of one stream"][1][1:6] == ["123.4", "12.5", "1,234,567", "300", "77"]
    first, second = tables["Stages of healing"][1:3]
    assert first[1:] == ["20", "10,240", "2.9800", "2.6000", "0.001", "1", "1.3000"]
    assert second[1:] == ["10", "15,360", "2.5800", "2.4000", "0.001", "0", "1.2000"]
    assert model.plan is not None
    kept = [value for name, value in model.plan.kept_energy.items() if name.endswith(".q_proj")]
    energies = {row[0]: row[1:] for row in tables[f"{NASTY}: energy kept by LoRAs"][1:]}
    assert energies["q_proj"] == [
        str(len(kept)),
        *(f"{each:.4f}" for each in (sum(kept) / len(kept), min(kept), max(kept))),
    ]
    assert len(tables[f"{NASTY}: tensors"]) == 1 + len(model.plan.lines)
    assert [row[0] for row in tables[f"{NASTY}: stages"][1:]] == ["convert"]
    assert tables["Measurements"][-1][1:] == ["2026-01-02T03:04:05", *tables["Measurements"][-1][2:]]
    commands = {row[1]: row[0] for row in tables["Commands"][1:]}
    assert commands["refold evaluate 'a b' --recall"].endswith(": evaluate")
    assert commands["refold convert <source>"] == f"{NASTY}: convert"


def test_sections_without_data_are_absent_and_named_with_their_command(bare: ReportRun, whole: ReportRun) -> None:
    page, full = render(bare), render(whole)
    found, complete = read(page), read(full)
    for anchor in ("size-and-loss", "healing", "similarity", "exits", "recall", "tasks", "noise", "speed"):
        assert anchor not in found.ids
        assert anchor in complete.ids
    for anchor in ("stack", "energy", "memory", "transfer", "provenance"):
        assert anchor in found.ids
    assert f"Recall by length: <code>refold evaluate {bare.path} --out card.json --recall</code>" in page
    assert len(re.findall("then give its output", page)) == 8
    assert "then give its output" not in full
    assert "branches could not run (no hybrid &lt;at all&gt;)" in full
    assert len(TOPICS) == len(make_sections([whole])[0])
    # Every link of the page leads to a section, and every picture has a file name of its own.
    assert {each[1:] for each in complete.addresses} <= set(complete.ids)
    assert len(complete.ids) == len(set(complete.ids))


def test_names_are_escaped_and_nothing_is_loaded(whole: ReportRun) -> None:
    page = render(whole)
    reader = read(page)
    assert "<b>" not in page
    assert html.escape(NASTY, quote=False).partition('"')[0] in page
    assert not reader.names & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "b", "tags"}
    assert all(address.startswith("#") for address in reader.addresses)
    assert not re.search(r"https?:|url\(|@import|style=|\son\w+=", page)
    assert "default-src 'none'; style-src 'unsafe-inline'" in page


def test_pictures_are_well_formed_and_the_same_in_both_formats(whole: ReportRun, bare: ReportRun) -> None:
    drawings = [drawing for section in make_sections([whole, bare])[0] for drawing in section.drawings]
    assert len(drawings) == len({drawing.name for drawing in drawings}) > 15
    for drawing in drawings:
        text = svg_file(drawing)
        assert "var(" not in text
        root = ET.fromstring(text)
        assert root.get("role") == "img"
        place = "{http://www.w3.org/2000/svg}"
        assert root.findtext(f"{place}title") == drawing.title
        assert root.findtext(f"{place}desc") == drawing.about
        words = [each.text for each in root.iter(f"{place}text")]
        drawn = [each.get_text().replace(r"\$", "$") for each in draw_figure(drawing).axes[0].texts]
        assert words == drawn
        assert len(words) > 5


def test_models_whose_names_differ_in_signs_alone_have_pictures_of_their_own(bare: ReportRun) -> None:
    runs = [replace(bare, name=name, models=(replace(bare.models[0], name=name),)) for name in ("a.b", "a b", "ж", "ю")]
    drawings = [drawing.name for section in make_sections(runs)[0] for drawing in section.drawings]
    assert {"stack-a-b", "stack-a-b-2", "stack", "stack-2"} <= set(drawings)
    assert len(drawings) == len(set(drawings))
    ids = read(render(*runs)).ids
    assert len(ids) == len(set(ids))


def test_a_report_replaces_only_reports(bare: ReportRun, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert write_report([bare], out) == out
    listed = json.loads((tmp_path / "page" / "pictures.json").read_text())["files"]
    assert {path.name for path in (tmp_path / "page").iterdir()} == {*listed, "pictures.json"}
    assert "memory.png" in listed
    assert (tmp_path / "page" / "memory.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FolderError, match="a new file is required"):
        write_report([bare], out)
    (tmp_path / "page" / "mine.svg").write_text("mine")
    other = replace(bare, name="other", models=(replace(bare.models[0], name="other"),))
    write_report([other], out, overwrite=True)
    assert (tmp_path / "page" / "mine.svg").read_text() == "mine"
    assert not (tmp_path / "page" / "stack-bare.svg").exists()
    assert (tmp_path / "page" / "stack-other.svg").exists()
    # A picture's name that the user took.
    (tmp_path / "page" / "stack-bare.svg").write_text("mine")
    with pytest.raises(FolderError, match=r"stack-bare\.svg: a free place is required for a picture"):
        write_report([bare], out, overwrite=True)
    assert (tmp_path / "page" / "stack-bare.svg").read_text() == "mine"


def test_foreign_files_are_never_replaced(bare: ReportRun, tmp_path: Path) -> None:
    page = tmp_path / "mine.html"
    page.write_text("<!doctype html><title>refold report</title>")
    with pytest.raises(FolderError, match=r"a report of `refold report` is required to be overwritten"):
        write_report([bare], page, overwrite=True)
    assert page.read_text().endswith("</title>")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(FolderError, match=r"notes: a new folder, or one of an earlier report, is required"):
        write_report([bare], tmp_path / "notes.html", overwrite=True)
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(FolderError, match=r"taken: a folder for pictures is required \(got a file\)"):
        write_report([bare], tmp_path / "taken.html")
    assert not (tmp_path / "taken.html").exists()
    assert not (tmp_path / "notes.html").exists()


def test_runs_of_two_sources_keep_their_sources_apart(
    bare: ReportRun, whole: ReportRun, evaluate_as: Callable[..., Evaluation]
) -> None:
    other = replace(whole, name="other", source="models/elsewhere", scorecards=())
    tables = read(render(whole, other)).tables
    names = [row[0] for row in tables["Size and loss on held out.txt"][1:]]
    assert {"source source", "source elsewhere", f"other: {NASTY}", "other: source in int8"} <= set(names)
    assert len(names) == len(set(names)) == 8
    # Another text is another picture.
    changed = replace(
        other, points=tuple(replace(each, scale=replace(each.scale, key="x", text="y")) for each in other.points)
    )
    sections = {section.anchor: section for section in make_sections([whole, changed])[0]}
    assert [drawing.name for drawing in sections["size-and-loss"].drawings] == ["size-and-loss", "size-and-loss-2"]


def test_every_drawn_picture_is_told(whole: ReportRun, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_report([whole], tmp_path / "page.html", progress=lambda done, total: told.append((done, total)))
    pictures = len(list((tmp_path / "page").glob("*.svg")))
    assert told == [(number + 1, pictures) for number in range(pictures)]
