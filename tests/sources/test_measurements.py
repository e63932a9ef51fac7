"""Measurements are read back unchanged, and refused for another source."""

import json
from pathlib import Path

import pytest

import refold
from refold.analysis.analyse import AnalysisSettings
from refold.checkpoint.locate import locate
from refold.errors import FolderError, SourceError
from refold.sources.measurements import read_measurements

QUICK = AnalysisSettings(tokens=32, context=16, spectra=False)


@pytest.fixture
def analysed(make_source, tmp_path: Path) -> Path:
    refold.analyse(make_source("llama"), tmp_path / "analysed", settings=QUICK)
    return tmp_path / "analysed"


def test_a_folder_or_its_file_gives_what_was_found(make_source, analysed: Path) -> None:
    source = locate(make_source("llama"))
    found = refold.analyse(make_source("llama"), settings=QUICK)
    assert read_measurements(analysed, source) == found
    assert read_measurements(analysed / "measurements.json", source) == found


def test_another_sources_measurements_are_refused(make_source, analysed: Path) -> None:
    other = make_source("llama", num_hidden_layers=5)
    with pytest.raises(SourceError, match=r"measurements of .* are required \(got those of .*; analyse this one"):
        refold.plan(other, "pruned", measurements=analysed)


def test_missing_and_damaged_measurements_are_refused(make_source, analysed: Path, tmp_path: Path) -> None:
    source = locate(make_source("llama"))
    with pytest.raises(FolderError, match=r"measurements are required \(No such file.*refold analyse SOURCE --out DIR"):
        read_measurements(tmp_path / "nowhere", source)
    (tmp_path / "old.json").write_text(
        json.dumps({**json.loads((analysed / "measurements.json").read_text()), "format": 2})
    )
    with pytest.raises(FolderError, match=r"measurements of format 1 are required \(format: .*analyse again"):
        read_measurements(tmp_path / "old.json", source)
