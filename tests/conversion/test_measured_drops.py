"""Drops by influence that conversion measures on text, or reads from measurements."""

import json
from pathlib import Path

import pytest

import refold
from refold.data.readers import from_documents
from refold.errors import RecipeError
from refold.planning.plan import Plan, plan_all, read_plan

TEXT = from_documents(
    [f"Chapter {number}: the sea was calm, and {number * 7} ships lay on it." for number in range(99)]
)
SMALL = {"calibration": {"tokens": 256, "context": 32}}
SIMILAR = {**SMALL, "drop": {"block": {"count": 1, "by": "similarity"}}}
AUTO = {**SMALL, "drop": {"block": {"count": 1, "by": "auto"}}}


def gone(plan: Plan) -> list[int]:
    return [depth.source for depth in plan.blueprint.depths if depth.mixer is None]


def test_text_decides_as_measurements_of_it_do(make_model, tmp_path: Path) -> None:
    source = make_model("llama")
    settings = refold.AnalysisSettings(tokens=256, context=32, spectra=False)
    found = refold.analyse(source, tmp_path / "analysed", TEXT, settings=settings)
    least = min(range(4), key=lambda layer: found.influence.block[layer])
    steps: list[tuple[int, int]] = []
    measured = refold.convert(
        source,
        tmp_path / "measured",
        SIMILAR,
        options=refold.ConvertOptions(progress=lambda *at: steps.append(at)),
        calibration=TEXT,
    )
    handed = refold.convert(source, tmp_path / "handed", SIMILAR, measurements=tmp_path / "analysed")
    assert (
        gone(measured)
        == gone(handed)
        == gone(refold.plan(source, SIMILAR, measurements=tmp_path / "analysed"))
        == [least]
    )
    assert measured.influence is not None
    assert measured.influence.block == pytest.approx(found.influence.block, abs=1e-9)
    assert read_plan(tmp_path / "measured" / "plan.json").influence == measured.influence
    assert f"dropped, by measured influence: layers {least}" in map(str, measured.notes)
    assert "calibration text: " in " ".join(map(str, measured.notes))
    assert not any("evenly spaced" in note for note in map(str, measured.notes))
    assert steps[-1][0] == steps[-1][1]
    weights = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("measured", "handed")]
    assert weights[0] == weights[1]


def test_similarity_needs_something_to_go_by(make_model, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"drop: measurements or calibration text are required for `by: similarity`"):
        refold.convert(make_model("llama"), tmp_path / "out", SIMILAR)
    assert not (tmp_path / "out").exists()


def test_auto_goes_by_text_where_there_is_some(make_model, tmp_path: Path) -> None:
    source = make_model("llama")
    even = refold.convert(source, tmp_path / "even", AUTO)
    assert even.influence is None
    assert any("evenly spaced" in note for note in map(str, even.notes))
    measured = refold.convert(source, tmp_path / "measured", AUTO, calibration=TEXT)
    assert measured.influence is not None
    assert gone(measured) == [min(range(4), key=lambda layer: measured.influence.block[layer])]


def test_measurements_reach_every_built_in_recipe_that_drops(make_model, tmp_path: Path) -> None:
    source = make_model("llama")
    refold.analyse(source, tmp_path / "analysed", settings=refold.AnalysisSettings(64, 16, spectra=False))
    plans = {each.name: each.plan for each in plan_all(source, tmp_path / "analysed")}
    assert plans["pruned"] is not None
    assert plans["pruned"].influence is not None
    assert plans["recursive"] is not None
    assert plans["recursive"].influence is None


def test_plans_of_earlier_versions_are_read(make_source, tmp_path: Path) -> None:
    made = json.loads(refold.plan(make_source("llama"), "pruned").model_dump_json())
    del made["influence"]
    (tmp_path / "plan.json").write_text(json.dumps(made))
    assert read_plan(tmp_path / "plan.json").influence is None
