"""The whole way in one go."""

import json
from pathlib import Path

import pytest

from refold.data.readers import from_documents
from refold.errors import FolderError
from refold.recipe.heal import HealStage
from refold.recipe.recipe import Recipe
from refold.studies.run import RunSettings, run

TEXTS = [f"def number_{index}():\n    return {index} * {index % 7}\n" for index in range(600)]
RECIPE = Recipe.model_validate({"fold": {"loops": 2}, "relax": {"rank": 2, "init": "joint"}})


@pytest.fixture(scope="module")
def source() -> Path:
    from refold.studies.shipped import shipped_model

    return shipped_model()


def stage(tokens: int) -> Recipe:
    heal = HealStage(tokens=tokens, batch_tokens=512, context=64)
    return RECIPE.model_copy(update={"heal": (heal,)})


SETTINGS = RunSettings(eval_tokens=400, device="cpu")


def test_a_run_measures_its_model_beside_a_pruned_one_and_goes_on(source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    data = from_documents(TEXTS)
    found = run(source, tmp_path / "run", stage(1024), data, settings=SETTINGS, say=said.append)
    assert found.line.startswith("folded: ")
    assert "pruned to the same size: " in found.line
    assert "cache 1.00x" in found.line
    assert found.healed.against is not None
    assert found.unhealed.bits_per_byte != found.healed.bits_per_byte
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["line"] == found.line
    assert (tmp_path / "run" / summary["model"] / "config.json").is_file()
    assert set(summary["baselines"]) == {"pruned", "quantised"}
    assert any("healing" in line for line in said)
    again: list[str] = []
    assert run(source, tmp_path / "run", stage(1024), data, settings=SETTINGS, say=again.append).line == found.line
    assert again == []
    with pytest.raises(FolderError, match=r"to go on with what it began with \(different: recipe"):
        run(source, tmp_path / "run", "recursive", data, settings=SETTINGS)


def test_a_run_without_healing_or_baselines(source: Path, tmp_path: Path) -> None:
    settings = RunSettings(tokens=0, baselines=(), eval_tokens=400, device="cpu")
    held_out = from_documents(TEXTS[:40])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.1.unfinished").write_text("{")  # of a first go that was killed
    found = run(source, tmp_path / "run", "recursive", from_documents(TEXTS), held_out=held_out, settings=settings)
    assert found.model == tmp_path / "run" / "folded" / "converted"
    assert found.healed == found.unhealed
    assert found.line.startswith("recursive: 46% smaller, ")
    assert "pruned" not in found.line


def test_tokens_of_several_stages_are_scaled_together(source: Path, tmp_path: Path) -> None:
    first = HealStage(tokens=3000, batch_tokens=512, context=64, seed=3)
    recipe = RECIPE.model_copy(update={"heal": (first, first.model_copy(update={"tokens": 1000}))})
    settings = RunSettings(tokens=2048, baselines=(), eval_tokens=400, device="cpu")
    run(source, tmp_path / "run", recipe, from_documents(TEXTS), settings=settings)
    provenance = json.loads((tmp_path / "run" / "folded" / "model" / "provenance.json").read_text())
    assert [step["stage"] for step in provenance["stages"]] == ["convert", "heal", "heal"]
    assert [step["tokens"] for step in provenance["stages"]] == [0, 1536, 512]
    assert [step["seed"] for step in provenance["stages"][1:]] == [3, 3]


@pytest.mark.parametrize(("chosen", "expected"), [(None, 3), (0, 0), (5, 5)])
def test_a_chosen_seed_goes_over_the_recipes_zero_too(chosen: int | None, expected: int) -> None:
    recipe = RECIPE.model_copy(update={"heal": (HealStage(tokens=10, seed=3),)})
    (found,) = RunSettings(seed=chosen).stages(recipe)
    assert found.seed == expected


def test_a_folder_of_the_users_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FolderError, match="a new folder, or one of an earlier run, is required"):
        run(source, tmp_path, "recursive", from_documents(TEXTS), settings=SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
