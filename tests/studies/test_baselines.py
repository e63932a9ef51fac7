"""Baselines of a run: their initial models, and equal healing and reporting."""

import json
from pathlib import Path
from typing import Any

import pytest

from refold.checkpoint.locate import PLAN_NAME, locate
from refold.checkpoint.provenance import read as read_provenance
from refold.checkpoint.reader import CheckpointReader
from refold.conversion.convert import carry_out
from refold.data.readers import from_documents
from refold.errors import RecipeError
from refold.planning.build import identity_blueprint
from refold.planning.factors import stored_share
from refold.planning.plan import plan_model, read_plan
from refold.recipe.heal import HealStage
from refold.recipe.load import load_recipe
from refold.recipe.recipe import Recipe
from refold.sources.source_model import read_source_model
from refold.studies.baselines import (
    BASELINES,
    BaselineJob,
    default_baselines,
    fitting_scheme,
    read_baselines,
    scratch_plan,
    scratch_recipe,
    whole_model_stages,
)
from refold.studies.job import RunSettings
from refold.studies.run import run

TEXTS = [f"def number_{index}():\n    return {index} * {index % 7}\n" for index in range(300)]
STAGE = {"objective": "distil", "tokens": 1024, "batch_tokens": 512, "context": 64}
RELAXED: dict[str, Any] = {"fold": {"loops": 2}, "relax": {"rank": 2, "init": "joint", "vectors": "own"}}
FOLDS = (
    RELAXED,
    {"fold": {"loops": 2, "init": [3, 1]}},
    {"fold": {"loops": 2, "prelude": 1, "uneven": "prelude"}, "relax": {"rank": {"parameters": 0.1}, "init": "svd"}},
    {"fold": {"loops": 2, "tie": ["mlp"]}, "drop": {"attention": {"count": 1}}, "exits": {"at": "loops"}},
    {"fold": {"loops": 2, "align": "both", "init": "average"}},
    {"fold": {"loops": 2, "scale": "norm", "init": "average"}},
    {"fold": {"loops": 2}, "factor": {"parameters": 0.6, "share": "basis", "weight": "none"}},
)


def test_baselines_are_named() -> None:
    assert read_baselines(None) is None
    assert read_baselines(["none"]) == ()
    assert read_baselines(["scratch", "trained-source", "pruned"]) == ("pruned", "trained-source", "scratch")
    with pytest.raises(
        RecipeError, match=r"one of pruned, lowrank, quantised, trained-source, scratch, none .got 'best'."
    ):
        read_baselines(["best"])


def test_settings_take_no_unknown_baseline() -> None:
    with pytest.raises(
        RecipeError,
        match=r"one of pruned, lowrank, quantised, trained-source, scratch .got 'prune'.; did you mean 'pruned'",
    ):
        RunSettings(baselines=("prune",))


@pytest.mark.parametrize("recipe", FOLDS, ids=str)
def test_scratch_is_the_folded_architecture_with_fresh_weights(make_source, tmp_path: Path, recipe: dict) -> None:
    source = make_source("llama-mha-bias")
    located, model = locate(source), read_source_model(source)
    plan = plan_model(model, Recipe.model_validate(recipe), allow_larger=True)
    folded, started = tmp_path / "folded", tmp_path / "scratch"
    carry_out(plan, located, folded)

    def convert(scratch: Any) -> Path:
        carry_out(scratch, located, started)
        return started

    assert BASELINES["scratch"].start(BaselineJob(located, model, plan, convert)) == started
    with CheckpointReader(folded) as ours, CheckpointReader(started) as theirs, CheckpointReader(source) as before:
        assert {name: ours.info(name).shape for name in ours.names()} == {
            name: theirs.info(name).shape for name in theirs.names()
        }
        fresh = theirs.read("model.embed_tokens.weight").clone()
        assert not fresh.equal(before.read("model.embed_tokens.weight"))
    made = scratch_plan(model, plan)
    assert made.blueprint == plan_model(model, scratch_recipe(plan), allow_larger=True).blueprint
    assert made.cost == plan.cost
    assert {line.how for line in made.lines} <= {"fresh", "dropped"}


def test_scratch_of_what_was_fitted_in_sequence_is_fitted_to_nothing(make_source) -> None:
    weighed = {**RELAXED["relax"], "weight": "activations"}
    recipe = {**RELAXED, "relax": weighed, "calibration": {"order": "sequential"}}
    model = read_source_model(make_source("llama"))
    plan = plan_model(model, Recipe.model_validate(recipe), allow_larger=True)
    made = scratch_plan(model, plan)
    assert made.cost == plan.cost
    assert not made.recipe.fits_in_sequence


MEASURED = (
    {"fold": {"loops": 2}, "relax": {"rank": {"energy": 0.5}}},
    {"fold": {"loops": 2}, "relax": {"rank": {"parameters": 0.2, "split": "measured"}}},
    {"factor": {"parameters": 0.5, "split": "measured", "weight": "none"}},
)


@pytest.mark.parametrize("recipe", MEASURED, ids=str)
def test_scratch_has_the_ranks_that_were_measured(make_source, tmp_path: Path, recipe: dict) -> None:
    source = make_source("llama")
    located, model = locate(source), read_source_model(source)
    planned = plan_model(model, Recipe.model_validate(recipe), allow_larger=True)
    plan = carry_out(planned, located, tmp_path / "folded")
    assert plan.blueprint != planned.blueprint
    made = scratch_plan(model, plan)
    assert carry_out(made, located, tmp_path / "scratch").cost == plan.cost
    assert {line.how for line in made.lines} <= {"fresh", "dropped"}
    with CheckpointReader(tmp_path / "folded") as ours, CheckpointReader(tmp_path / "scratch") as theirs:
        shapes = [{name: each.info(name).shape for name in each.names()} for each in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_an_unhealed_run_leaves_out_what_says_nothing_then(tmp_path: Path) -> None:
    from refold.studies.shipped import shipped_model

    settings = RunSettings(tokens=0, baselines=tuple(BASELINES), eval_tokens=400, device="cpu")
    data, held_out = from_documents(TEXTS), from_documents(TEXTS[:40])
    recipe = {"fold": {"loops": 2}, "calibration": {"tokens": 512, "context": 64}}
    found = run(shipped_model(), tmp_path / "run", recipe, data, held_out=held_out, settings=settings)
    assert set(found.baselines) == {"pruned", "lowrank", "quantised"}
    lowrank = read_plan(tmp_path / "run" / "lowrank" / "converted" / PLAN_NAME)
    assert lowrank.starts.weight == "activations"
    source = identity_blueprint(lowrank.blueprint.arch)
    assert 0.49 < stored_share(lowrank.blueprint, source) <= stored_share(found.plan.blueprint, source) == 0.5
    assert "low rank at the same size: " in found.line
    assert not (tmp_path / "run" / "quantised" / "converted").exists()
    quantised = found.baselines["quantised"]
    assert found.healed.against is not None
    assert (quantised.model.quantised, quantised.model.name) == ("int4", found.healed.against.model.name)
    assert quantised.model.weight_bytes <= found.plan.cost.target.weight_bytes
    assert (
        f"source in int4, {1 - quantised.model.weight_bytes / found.plan.cost.source.weight_bytes:.0%} smaller: +"
        in (found.line)
    )


def test_a_run_heals_and_reports_scratch_alike(tmp_path: Path) -> None:
    from refold.studies.shipped import shipped_model

    settings = RunSettings(baselines=("scratch",), eval_tokens=400, device="cpu")
    recipe = load_recipe({**RELAXED, "heal": [STAGE]})
    found = run(shipped_model(), tmp_path / "run", recipe, from_documents(TEXTS), settings=settings)
    assert "(the same from scratch: +" in found.line
    assert found.baselines["scratch"].bits_per_byte > found.healed.bits_per_byte + 1
    folded, scratch = (read_provenance(tmp_path / "run" / arm / "model") for arm in ("folded", "scratch"))
    assert [stage.stage for stage in scratch] == ["convert", "heal"]
    assert scratch[1].recipe == folded[1].recipe  # both starts are far, so both have the same learning rate
    assert scratch[1].tokens == folded[1].tokens == 1024
    assert set(json.loads((tmp_path / "run" / "summary.json").read_text())["baselines"]) == {"scratch"}


def stages_of(protocol: str) -> tuple[HealStage, ...]:
    return load_recipe({"heal": {"protocol": protocol, "tokens": 1000}}).heal


def test_a_rival_trains_whole_where_the_model_trains_parts() -> None:
    aligned, _, text = whole_model_stages(stages_of("align-then-distil"))
    (thawing,) = whole_model_stages(stages_of("xatl"))
    assert (aligned.train, list(aligned.objective.chosen()), aligned.learning_rate) == (("all",), ["distil"], None)
    assert (thawing.thaw, list(thawing.objective.chosen())) == (None, ["next_token"])
    assert (text.learning_rate, text.tokens) == (1e-4, 200)


def test_the_rival_of_a_target_as_large_as_its_source_is_the_same_from_scratch(make_source: Any) -> None:
    model = read_source_model(make_source("llama"))
    smaller = plan_model(model, load_recipe({"fold": {"loops": 2}}))
    larger = plan_model(model, load_recipe({"mixers": [{"type": "retention"}]}), allow_larger=True)
    assert (default_baselines(smaller), default_baselines(larger)) == (("pruned", "quantised"), ("scratch",))


@pytest.mark.parametrize(("drop", "scheme"), [(1, "int8"), (2, "int4"), (3, "int4")])
def test_the_most_precise_scheme_that_is_no_larger_is_taken(make_source: Any, drop: int, scheme: str) -> None:
    # Of four layers in bfloat16; int8 halves them, and its scales make that a little more than half.
    source = make_source("llama", dtype="bfloat16")
    plan = plan_model(read_source_model(source), load_recipe({"drop": {"block": {"count": drop}}}))
    assert fitting_scheme(plan) == scheme


def test_a_healed_run_does_not_heal_what_is_quantised(tmp_path: Path) -> None:
    from refold.studies.shipped import shipped_model

    settings = RunSettings(baselines=("quantised",), eval_tokens=400, device="cpu")
    recipe = load_recipe({**RELAXED, "heal": [STAGE]})
    found = run(shipped_model(), tmp_path / "run", recipe, from_documents(TEXTS), settings=settings)
    assert [path.name for path in (tmp_path / "run" / "quantised").iterdir()] == ["unhealed.json"]
    stated = json.loads((tmp_path / "run" / "summary.json").read_text())["baselines"]["quantised"]["model"]
    assert (stated["quantised"], stated["weight_bytes"]) == ("int8", found.baselines["quantised"].model.weight_bytes)
