"""A fit folder is read as sizes and losses of its chosen models and single methods."""

from pathlib import Path

import pytest

from refold.errors import FolderError
from refold.fitting.finished import FIT_FOLDER, fit_points, read_fit_folder
from refold.fitting.report import FitReport
from refold.report.opening import open_runs
from refold.report.page import make_sections


def test_points_are_those_of_the_report(swept: FitReport, tmp_path: Path) -> None:
    (tmp_path / "fit.json").write_text("{}")
    swept.write(tmp_path / "front.json")
    (run,) = open_runs([tmp_path], [FIT_FOLDER])
    assert run.kind == "fit"
    assert run.source == "models/smol"
    assert run.points == fit_points(swept)
    assert (run.points[0].loss, run.points[0].bytes, run.points[0].is_source) == (0.0, 269e6, True)
    chosen = [each for each in run.points if each.series == "this fit"]
    assert [each.loss for each in chosen] == [point.loss for point in swept.points]
    assert [each.bytes for each in chosen] == [point.costs.bytes for point in swept.points]
    first = swept.points[0].measured
    errors = [each.error for each in first.values() if each.error is not None]
    assert chosen[0].error == pytest.approx(sum(error**2 for error in errors) ** 0.5 / 2)
    made = [single for point in swept.points for single in point.singles if single.made is not None]
    assert len(run.points) == 1 + len(chosen) + len(made)
    (section,) = [each for each in make_sections([run])[0] if each.anchor == "size-and-loss"]
    assert section.drawings[0].name == "size-and-loss"
    assert "nats per token over the source" in section.tables[0].head


def test_an_unfinished_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fit.json").write_text("{}")
    with pytest.raises(FolderError, match=r"a finished fit is required \(front\.json is missing\); repeat its command"):
        read_fit_folder(tmp_path)
    (tmp_path / "front.json").write_text('{"format": 2}')
    with pytest.raises(FolderError, match=r"a report of `fit` of format 1 is required \(format: "):
        read_fit_folder(tmp_path)
