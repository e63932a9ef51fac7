"""Conversion, healing and evaluation in one run."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from refold.data.readers import from_documents
from refold.errors import FolderError, HealError, RecipeError, RefoldError
from refold.progress import Show
from refold.recipe.heal import HealStage
from refold.recipe.recipe import Recipe
from refold.studies.forecast import forecast
from refold.studies.job import RunOptions, RunSettings, choose_eval_tokens, read_job
from refold.studies.run import run

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
    found = run(
        source, tmp_path / "run", stage(1024), data, settings=SETTINGS, options=RunOptions(show=Show(said.append))
    )
    assert found.line.startswith("folded: ")
    assert "pruned to the same size: " in found.line
    assert "cache 1.00x" in found.line
    assert found.healed.against is not None
    assert found.unhealed.bits_per_byte != found.healed.bits_per_byte
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["line"] == found.line
    assert (tmp_path / "run" / summary["model"] / "config.json").is_file()
    assert set(summary["baselines"]) == {"pruned", "quantised"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"{found.healed.bits_per_byte:.4f}" in page
    assert (tmp_path / "run" / "report" / "training-loss-stage-1.png").is_file()
    assert any("healing" in line for line in said)
    again: list[str] = []
    shown = RunOptions(show=Show(again.append))
    assert run(source, tmp_path / "run", stage(1024), data, settings=SETTINGS, options=shown).line == found.line
    assert said[0].startswith("healing text comes from documents in memory alone")
    assert again == [said[1]]
    with pytest.raises(
        FolderError, match=r"run with other settings .*recipe\.fold\.init was \"average\".*; repeat its command"
    ):
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


@pytest.mark.parametrize(("overrides", "expected"), [((), 3), (("heal.seed=0",), 0), (("heal.seed=5",), 5)])
def test_a_chosen_seed_goes_over_the_recipes_zero_too(source: Path, overrides: tuple[str, ...], expected: int) -> None:
    recipe = RECIPE.model_copy(update={"heal": (HealStage(tokens=10, seed=3),)})
    job = read_job(source, recipe, from_documents(TEXTS), None, SETTINGS, RunOptions(overrides))
    assert [stage.seed for stage in job.stages] == [expected]


def test_a_folder_of_the_users_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FolderError, match=r"or one of an earlier run, is required .*; choose another output"):
        run(source, tmp_path, "recursive", from_documents(TEXTS), settings=SETTINGS)
    with pytest.raises(FolderError, match="a folder's place is required"):
        run(source, tmp_path / "thesis.txt", "recursive", from_documents(TEXTS), settings=SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_place_that_cannot_be_written_is_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FolderError, match="a writable place is required"):
        run(source, tmp_path / "file" / "run", "recursive", from_documents(TEXTS), settings=SETTINGS)


def test_evaluation_and_conversion_tell_how_far_they_are(source: Path, tmp_path: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    @contextlib.contextmanager
    def progress(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        assert unit in ("steps", "windows", "pictures")
        yield lambda done, total: told.setdefault(label, []).append((done, total))

    settings = RunSettings(tokens=0, baselines=("pruned",), eval_tokens=400, device="cpu")
    options = RunOptions(show=Show(progress=progress))
    run(source, tmp_path / "run", "recursive", from_documents(TEXTS), settings=settings, options=options)
    labels = {f"{arm}: {what}" for arm in ("folded", "pruned") for what in ("converting", "evaluating")}
    assert set(told) == labels | {"drawing the page"}
    for calls in told.values():
        assert calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 50_000), (20_000, 8_000), (100_000, 25_000), (20_000_000, 200_000)]
)
def test_evaluation_follows_the_healing_budget(tokens: int, expected: int) -> None:
    assert choose_eval_tokens(tokens) == expected


def test_a_run_says_how_much_text_it_evaluates_on_and_keeps_to_it(source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    settings = RunSettings(tokens=0, baselines=(), device="cpu")
    options = RunOptions(show=Show(said.append))
    found = run(source, tmp_path / "run", "recursive", from_documents(TEXTS), settings=settings, options=options)
    assert said[1] == "evaluating on up to 50,000 held-out tokens for each model (--eval-tokens)"
    assert 0 < found.healed.tokens <= 50_000
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["eval_tokens"] == 50_000


def test_a_dry_run_says_what_would_be_made_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    settings = RunSettings(tokens=20_000, device="cpu")
    job = read_job(source, "recursive", from_documents(TEXTS), None, settings, RunOptions())
    found = forecast(job)
    assert list(tmp_path.iterdir()) == []
    assert "folded by recursive: 46% smaller" in found.lines
    assert "baselines: pruned, quantised" in found.lines
    assert "healing: 20,000 tokens for each of 2 models (folded, pruned)" in found.lines
    assert "8,000 held-out tokens" in found.line
    assert "40 steps of 512 tokens" in found.line
    assert found.heal_hours is not None
    assert found.evaluate_hours is not None
    assert found.heal_hours > 0 < found.evaluate_hours


MISTAKES = [
    ({"device": "tpu"}, {}, RefoldError, "device: one of this machine's devices is required"),
    ({}, {"heal.context": 4096}, HealError, r"heal.context: must be at most the model's \d+ positions \(got 4096\)"),
    ({}, {"heal.contxt": 4096}, RecipeError, "did you mean 'context'"),
]


@pytest.mark.parametrize(("changes", "keys", "kind", "says"), MISTAKES, ids=str)
@pytest.mark.parametrize("begun", [False, True])
def test_a_mistake_is_found_before_anything_is_written_and_an_unfinished_run_does_not_hide_it(
    source: Path, tmp_path: Path, changes: dict, keys: dict, kind: type, says: str, begun: bool
) -> None:
    root = tmp_path / "run"
    if begun:
        (root / "folded" / "converted").mkdir(parents=True)
        (root / "run.json").write_text('{"format": 1, "recipe": {}}')
    settings = RunSettings(**{"eval_tokens": 400, "device": "cpu", **changes})
    options = RunOptions([f"{key}={value}" for key, value in keys.items()])
    with pytest.raises(kind, match=says):
        run(source, root, stage(1024), from_documents(TEXTS), settings=settings, options=options)
    assert root.exists() == begun


def test_a_run_that_made_nothing_does_not_hold_its_folder(source: Path, tmp_path: Path) -> None:
    root, data = tmp_path / "run", from_documents(TEXTS)

    @contextlib.contextmanager
    def fail(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        raise FolderError("disk full")
        yield

    settings = RunSettings(tokens=0, baselines=(), eval_tokens=400, device="cpu")
    with pytest.raises(FolderError, match="disk full"):
        run(source, root, "recursive", data, settings=settings, options=RunOptions(show=Show(progress=fail)))
    assert not root.exists()
    root.mkdir()
    (root / "run.json").write_text(
        '{"format": 1, "recipe": {}}'
    )  # of a first go that was killed before it made a thing
    run(source, root, "recursive", data, settings=settings)
    assert json.loads((root / "run.json").read_text())["recipe"] != {}


@pytest.mark.parametrize(("changes", "says"), [({"tokens": -5}, "--tokens"), ({"eval_tokens": 0}, "--eval-tokens")])
def test_a_number_out_of_range_names_its_option(changes: dict, says: str) -> None:
    with pytest.raises(RecipeError, match=rf"{says}: must be at least \d \(got -?\d\)"):
        RunSettings(**changes)
