"""A run folder is read whole; unfinished, damaged and newer ones are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refold.conversion.convert import ConvertOptions, convert
from refold.errors import FolderError
from refold.report.opening import open_runs
from refold.studies.finished import RUN_FOLDER, read_run_folder
from tests.report.conftest import evaluate_as, make_log

__all__ = ["evaluate_as"]


@pytest.fixture(scope="module")
def made(
    make_source: Callable[..., Path], evaluate_as: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run folder, its model converted and its figures made up."""
    root = tmp_path_factory.mktemp("run")
    recipe = {"fold": {"loops": 2}}
    convert(make_source(), root / "folded" / "model", recipe, options=ConvertOptions(command="refold run x y"))
    log = "".join(json.dumps(step) + "\n" for step in make_log("x").steps)
    (root / "folded" / "model" / "train.jsonl").write_text(log)
    (root / "pruned" / "model").mkdir(parents=True)
    (root / "pruned" / "model" / "train.jsonl").write_text(log)
    figures = {
        "line": "recursive: 48% smaller, +0.125 bits per byte to the source",
        "notes": ["a note"],
        "model": "folded/model",
        "unhealed": evaluate_as("folded/converted", 200, 2.5).model_dump(mode="json"),
        "healed": evaluate_as("folded/model", 200, 1.375).model_dump(mode="json"),
        "baselines": {"pruned": evaluate_as("pruned/model", 210, 1.5).model_dump(mode="json")},
    }
    (root / "run.json").write_text(json.dumps({"format": 1}))
    (root / "summary.json").write_text(json.dumps(figures))
    return root


def test_a_run_has_its_model_its_baselines_and_their_logs(made: Path, make_source: Callable[..., Path]) -> None:
    (run,) = open_runs([made], [RUN_FOLDER])
    assert run.line.startswith("recursive: 48% smaller")
    assert run.source == str(make_source())
    assert [(each.name, each.loss) for each in run.points] == [
        ("source", 1.25),
        ("recursive, unhealed", 2.5),
        ("recursive", 1.375),
        ("pruned to the same size", 1.5),
    ]
    assert [log.name for log in run.logs] == ["recursive", "pruned to the same size"]
    assert run.notes[0] == "a note"
    assert [stage.command for stage in run.models[0].stages] == ["refold run x y"]


def test_unfinished_damaged_and_newer_runs_are_refused(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(made, root)
    (root / "run.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(FolderError, match=r"run\.json: a run of format 1 is required \(got 2\); update refold"):
        read_run_folder(root)
    (root / "run.json").write_text(json.dumps({"format": 1}))
    figures = json.loads((root / "summary.json").read_text())
    del figures["healed"]["machine"]
    (root / "summary.json").write_text(json.dumps(figures))
    with pytest.raises(FolderError, match=r"a summary of `refold run` is required \(.*machine Field required"):
        read_run_folder(root)
    (root / "summary.json").unlink()
    with pytest.raises(
        FolderError, match=r"a finished run is required \(summary\.json is missing\); repeat its command"
    ):
        read_run_folder(root)
