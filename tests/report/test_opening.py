"""RUNs are read by kind; other folders, torn ones and newer files are refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refold.errors import FolderError, RefoldError
from refold.evaluation.result import Evaluation
from refold.report.opening import open_runs
from refold.sources.measurements import Measurements
from tests.report.conftest import make_card


def test_models_analyses_and_scorecards_are_read(
    folded: Path,
    make_source: Callable[..., Path],
    measured: Measurements,
    evaluate_as: Callable[..., Any],
    tmp_path: Path,
) -> None:
    measured.write(tmp_path)
    text: Evaluation = evaluate_as("out/model", 300, 1.375)
    card = make_card("deep/out/model", text)
    (tmp_path / "card.json").write_text(card.model_dump_json())
    text.write(tmp_path / "text.json")
    paths = [folded, make_source(), tmp_path, tmp_path / "card.json", str(tmp_path / "text.json")]
    model, stock, analysis, scored, evaluated = open_runs(paths)
    assert (model.kind, stock.kind, analysis.kind, scored.kind, evaluated.kind) == (
        "model",
        "model",
        "analysis",
        "scorecard",
        "scorecard",
    )
    assert model.source == str(make_source())
    assert model.models[0].blueprint.num_depths == 4
    assert model.models[0].cost.target.weight_bytes < model.models[0].cost.source.weight_bytes
    assert model.models[0].plan is not None
    assert stock.models[0].plan is None
    assert stock.models[0].cost.source == stock.models[0].cost.target
    assert analysis.measurements == measured
    assert scored.scorecards[0].found == card
    assert scored.scorecards[0].name == "out/model"
    assert [(each.bytes, each.loss, each.is_source) for each in evaluated.points] == [
        (400, 1.25, True),
        (300, 1.375, False),
    ]
    assert scored.points == evaluated.points


def test_runs_of_one_name_get_longer_names(folded: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(folded, tmp_path / name / "model")
    found = open_runs([tmp_path / "a" / "model", tmp_path / "b" / "model", tmp_path / "a" / "model"])
    assert [run.name for run in found] == ["a/model (1)", "b/model", "a/model (3)"]


def test_bad_input_is_refused_with_its_reason(folded: Path, evaluate_as: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    torn = tmp_path / "torn"
    shutil.copytree(folded, torn)
    next(torn.glob("*.safetensors")).unlink()
    logged = tmp_path / "logged"
    shutil.copytree(folded, logged)
    (logged / "train.jsonl").write_text("{]\n")
    card = json.loads(make_card("m", None).model_dump_json())
    evaluation = json.loads(evaluate_as("m", 1, 1.0).model_dump_json())
    files = {
        "newer.json": {**card, "format": 99},
        "newer-text.json": {**evaluation, "format": 99},
        "part.json": {key: value for key, value in card.items() if key != "machine"},
        "list.json": [1],
        "measurements.json": {"format": 1},
    }
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "broken.json").write_text("{")
    for name, said in {
        "absent": r"a model, or a JSON file of `refold evaluate`, is required \(got nothing\)",
        "empty": r"is required \(got a folder without any of measurements\.json, config\.json\); check the path",
        "torn": r"torn: the files of manifest\.json are required whole",
        "logged": r"train\.jsonl: a training log of `refold heal` is required",
        "newer.json": r"format 99 is newer than this refold reads \(2\); update refold",
        "newer-text.json": r"format 99 is newer than this refold reads",
        "part.json": r"part\.json: a scorecard is required \(machine: Field required\)",
        "list.json": r"list\.json: a scorecard is required",
        "broken.json": r"broken\.json: a scorecard is required",
        ".": r"measurements\.json: measurements of `refold analyse` of this version is required",
    }.items():
        with pytest.raises(RefoldError, match=said):
            open_runs([tmp_path / name])
    with pytest.raises(FolderError):
        open_runs([folded, tmp_path / "empty"])


def test_a_folder_of_scorecards_stands_for_its_files(evaluate_as: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / f"{name}.json").write_text(make_card(name, evaluate_as(name, 300, 1.375)).model_dump_json())
    assert [run.name for run in open_runs([tmp_path])] == ["one", "other"]
    (tmp_path / "more.json").write_text("{}")
    with pytest.raises(FolderError, match=r"more\.json"):
        open_runs([tmp_path])
