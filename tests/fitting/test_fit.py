"""Whole fits of a tiny source: limits kept, recipes that convert to the same model, and folders that are used again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refold.blueprint.cost import cost
from refold.checkpoint.folded_tensors import read_blueprint
from refold.conversion.convert import ConvertOptions, convert
from refold.errors import DataError, FolderError, RefoldError
from refold.evaluation.evaluate import evaluate
from refold.fitting.budget import Budget, parse_budget
from refold.fitting.fit import fit, sweep
from refold.fitting.job import FitJob
from refold.fitting.options import FitOptions
from refold.fitting.report import FitReport, read_report
from refold.fitting.workspace import FitFolder
from refold.planning.build import identity_blueprint
from refold.sources.source_model import read_source_model
from refold.studies.shipped import shipped_model

TEXTS = [f"def number_{index}():\n    return {index} * {index % 7}\n" for index in range(2000)]
OTHERS = [f"The {index % 11} birds sat on {index} trees, and none of them sang.\n" for index in range(2000)]
COMPARED = FitOptions(calibration_tokens=256, eval_tokens=256, looks=2, device="cpu")
OPTIONS = replace(COMPARED, singles=False)
CONTEXT = 512


@pytest.fixture(scope="module")
def source(make_source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny source with a real tokenizer."""
    shipped = shipped_model()
    vocab_size = json.loads((shipped / "config.json").read_text())["vocab_size"]
    folder = tmp_path_factory.mktemp("fit") / "source"
    shutil.copytree(make_source("llama", vocab_size=vocab_size, intermediate_size=96), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished fit of the texts."""
    out = tmp_path_factory.mktemp("finished") / "out"
    fit(source, out, budget_of(bytes="60%"), OPTIONS, data=TEXTS)
    return out


@pytest.fixture
def measured(finished: Path, tmp_path: Path) -> Path:
    """A folder in which a fit of the texts was measured, and no budget was finished."""
    out = tmp_path / "measured"
    for name in ("measured", "candidates"):
        shutil.copytree(finished / name, out / name)
    shutil.copy(finished / "fit.json", out / "fit.json")
    return out


def budget_of(**limits: Any) -> Budget:
    return parse_budget(**limits, context=CONTEXT)


def blueprint_of(folder: Path):
    return read_blueprint(str(folder), json.loads((folder / "config.json").read_text()))


def test_a_fit_keeps_its_limit_and_its_recipe_gives_the_model_again(source: Path, tmp_path: Path) -> None:
    data = {"code": TEXTS, "prose": OTHERS}
    found = fit(source, tmp_path / "out", parse_budget(bytes="40%"), COMPARED, data=list(data.values()))
    (point,) = found.points
    arch = read_source_model(source).arch
    whole = cost(identity_blueprint(arch), 2).weight_bytes
    assert found.source_costs.bytes == whole
    blueprint = blueprint_of(tmp_path / "out" / "model")
    stored = cost(blueprint, 2).weight_bytes
    assert stored <= 0.4 * whole
    assert point.costs.bytes == stored
    assert (
        sum(path.stat().st_size for path in (tmp_path / "out" / "model").glob("*.safetensors")) < 0.4 * whole + 60_000
    )
    assert {single.name for single in point.singles} >= {"int8", "int4", "low rank", "pruning", "width", "recursion"}
    assert point.measured
    assert point.predicted is not None
    assert point.predicted > 0
    assert read_report(tmp_path / "out") == found
    again = convert(
        source,
        tmp_path / "again",
        str(tmp_path / "out" / "recipe.yaml"),
        options=ConvertOptions(allow_larger=True),
        calibration=list(data.values()),
    )
    assert again.blueprint == blueprint
    held_out = TEXTS[:40]
    assert evaluate(tmp_path / "again", held_out).bits_per_byte == pytest.approx(
        evaluate(tmp_path / "out" / "model", held_out).bits_per_byte, rel=0.2
    )


def test_a_second_budget_uses_what_was_measured_and_replaces_only_when_asked(
    source: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    menu = (out / "measured" / "menu.json").stat()
    with pytest.raises(FolderError, match="--overwrite"):
        fit(source, out, budget_of(bytes="45%"), OPTIONS, data=TEXTS)
    options = replace(OPTIONS, overwrite=True)
    found = fit(source, out, budget_of(bytes="45%"), options, data=TEXTS)
    after = (out / "measured" / "menu.json").stat()
    assert after.st_mtime_ns == menu.st_mtime_ns
    assert found.points[0].costs.bytes <= 0.45 * found.source_costs.bytes
    with pytest.raises(FolderError, match="other calibration_tokens there"):
        fit(source, out, budget_of(bytes="45%"), FitOptions(calibration_tokens=128), data=TEXTS)


QUICK = replace(OPTIONS, calibration_tokens=128, eval_tokens=64, looks=1, without=("mixer", "width", "tie"))
AGAIN = replace(QUICK, overwrite=True)


def test_the_same_budget_again_gives_the_same_model_also_after_a_kill_while_it_is_published(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, budget, other = tmp_path / "out", parse_budget(bytes="50%"), parse_budget(bytes="70%")
    weights = out / "model" / "model.safetensors"
    found = fit(source, out, budget, QUICK, data=TEXTS)
    first = weights.read_bytes()
    fit(source, out, budget, AGAIN, data=TEXTS)
    assert weights.read_bytes() == first

    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    for target, step in ((FitReport, "write"), (FitFolder, "publish"), (FitFolder, "withdraw")):
        fit(source, out, other, AGAIN, data=TEXTS)
        assert weights.read_bytes() != first
        with monkeypatch.context() as patched:
            patched.setattr(target, step, killed)
            with pytest.raises(KeyboardInterrupt):
                fit(source, out, budget, AGAIN, data=TEXTS)
        assert not (out / "front.json").exists()
        assert fit(source, out, budget, QUICK, data=TEXTS).points[0].recipe == found.points[0].recipe
        assert weights.read_bytes() == first


def test_too_little_text_is_named_also_beside_held_out_text(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"more text is required, because candidates .* give more --data"):
        fit(source, tmp_path / "out", parse_budget(bytes="50%"), QUICK, data=TEXTS[:1], held_out=OTHERS)
    with pytest.raises(DataError, match=r"more text is required to hold some out .* name held-out text"):
        fit(source, tmp_path / "out", parse_budget(bytes="50%"), QUICK, data=TEXTS[:1])


def test_a_budget_above_the_source_is_named_before_anything_is_measured(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RefoldError, match=r"a limit below the source is required \(--bytes 120%"):
        fit(source, tmp_path / "out", parse_budget(bytes="120%"), QUICK, data=TEXTS)
    assert not (tmp_path / "out").exists()


def test_held_out_text_that_was_measured_on_is_said(source: Path, tmp_path: Path) -> None:
    for name, texts in (("a", TEXTS), ("b", OTHERS)):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))
    data = str(tmp_path / "a.txt")
    said = [
        FitJob.open(source, tmp_path / "out", QUICK, [data], [str(tmp_path / held_out)]).notes
        for held_out in ("a.txt", "b.txt")
    ]
    assert [any("is in --data and in --held-out" in note for note in notes) for notes in said] == [True, False]


@pytest.mark.long
def test_losses_on_few_tokens_are_not_given_for_many(source: Path, tmp_path: Path) -> None:
    few = fit(source, tmp_path / "out", parse_budget(bytes="50%"), QUICK, data=TEXTS)
    more = replace(AGAIN, eval_tokens=256)
    many = fit(source, tmp_path / "out", parse_budget(bytes="50%"), more, data=TEXTS)
    for name in ("plan.json", "look-64.json"):
        (damaged,) = (tmp_path / "out" / "candidates").glob(f"fit*/{name}")
        damaged.write_text("{")
        again = fit(source, tmp_path / "out", parse_budget(bytes="50%"), more, data=TEXTS)
        assert again.points[0].losses == many.points[0].losses
        assert damaged.read_text() != "{"
    assert few.held_out[0].tokens <= 64 < many.held_out[0].tokens <= 256


def test_the_result_of_a_sweep_replaces_that_of_a_fit_and_the_reverse(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fit(source, out, parse_budget(bytes="50%"), QUICK, data=TEXTS)
    sweep(source, out, [parse_budget(bytes=share) for share in ("50%", "70%")], AGAIN, data=TEXTS)
    assert {each.name for each in out.iterdir()} >= {"front.html", "front.json", "recipes"}
    assert not (out / "model").exists()
    assert not (out / "recipe.yaml").exists()
    fit(source, out, parse_budget(bytes="50%"), AGAIN, data=TEXTS)
    assert (out / "model").exists()
    assert not (out / "front.html").exists()
    assert not list((out / "recipes").iterdir())


def test_a_sweep_writes_a_recipe_for_each_budget_and_a_page(source: Path, measured: Path) -> None:
    budgets = [budget_of(bytes=share) for share in ("30%", "50%")]
    found = sweep(source, measured, budgets, OPTIONS, data=TEXTS)
    small, large = found.points
    assert small.costs.bytes <= 0.3 * found.source_costs.bytes < large.costs.bytes <= 0.5 * found.source_costs.bytes
    assert small.predicted is not None
    assert large.predicted is not None
    assert small.predicted > large.predicted
    assert len(list((measured / "recipes").glob("*.yaml"))) == 2
    assert "bytes 30%" in (measured / "front.html").read_text()
    assert not (measured / "model").exists()
    assert not small.singles


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({"cache": "60%"}, marks=pytest.mark.long),
        pytest.param({"flops": "80%"}, marks=pytest.mark.long),
        {"bytes": "50%", "flops": "90%"},
    ],
)
def test_other_limits_are_kept_too(source: Path, measured: Path, limits: dict[str, str]) -> None:
    found = fit(source, measured, budget_of(**limits), COMPARED, data=TEXTS)
    for name, share in limits.items():
        reached = getattr(found.points[0].costs, name) / getattr(found.source_costs, name)
        assert reached <= float(share.rstrip("%")) / 100 + 1e-9


def test_a_loss_asks_for_the_fewest_bytes(source: Path, measured: Path) -> None:
    options = replace(OPTIONS, looks=4)
    with pytest.raises(RefoldError, match="--max-loss: a measured loss of at most"):
        fit(source, measured, budget_of(max_loss=0.0000001), options, data=TEXTS)
    found = fit(source, measured, budget_of(max_loss=0.5), options, data=TEXTS)
    assert found.points[0].costs.bytes < found.source_costs.bytes


def test_an_engine_restricts_the_choice(source: Path, measured: Path) -> None:
    options = replace(OPTIONS, engine="llama.cpp")
    found = fit(source, measured, budget_of(bytes="60%"), options, data=TEXTS)
    blueprint = blueprint_of(measured / "model")
    schemes = {scheme for part in (*blueprint.mixers, *blueprint.mlps) for scheme in part.quantised.values()}
    assert schemes <= {"int8", "int4", "int4g64", "int4g128"}
    assert not any(part.factors for part in (*blueprint.mixers, *blueprint.mlps))
    assert found.engine == "llama.cpp"


def test_healing_is_measured_and_the_whole_budget_said_first(source: Path, measured: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, tokens=2048)
    forecast = fit(
        source,
        tmp_path / "none",
        budget_of(bytes="40%"),
        replace(options, dry_run=True),
        data=TEXTS,
    )
    assert any("2,048 tokens, after 2 candidates for 204 tokens each: 2,456 in all" in note for note in forecast.notes)
    assert not (tmp_path / "none").exists()
    found = fit(source, measured, budget_of(bytes="40%"), options, data=TEXTS)
    (point,) = found.points
    assert point.healed
    assert point.healed != point.measured
    stages = json.loads((measured / "model" / "provenance.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["convert", "heal", "quantise"]
    blueprint = blueprint_of(measured / "model")
    assert cost(blueprint, 2).weight_bytes == point.costs.bytes <= 0.4 * found.source_costs.bytes
    listed = {each for row in point.recipe["quantise"]["layers"].values() for each in row}
    parts = (*blueprint.mixers, *blueprint.mlps)
    assert {scheme for part in parts for scheme in part.quantised.values()} <= listed


def test_a_budget_below_the_floor_says_what_it_is_made_of(source: Path, measured: Path) -> None:
    with pytest.raises(RefoldError, match=r"--bytes: at least .*embedding .* is required \(got 1%"):
        fit(source, measured, budget_of(bytes="1%"), OPTIONS, data=TEXTS)
