"""Conversions that measure: ranks and moments from a tiny model and a little text."""

from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
import torch
from safetensors.torch import load_file

from refold.conversion.convert import SCRATCH_NAME, ConvertOptions, convert
from refold.data.mixture import Mixture
from refold.errors import DataError, RecipeError
from refold.modeling.load import load_model
from refold.planning.build import UNMEASURED_RANKS, identity_blueprint
from refold.planning.factors import linear_budget, lora_parameters, stored_linears
from refold.planning.plan import plan, read_plan

SMALL = {"calibration": {"tokens": 512, "context": 32}}
LOWRANK = {**SMALL, "factor": {"parameters": 0.7, "split": "measured", "weight": "fisher"}}
FOLD = {"loops": 2}
TOGETHER = {
    **LOWRANK,
    "fold": FOLD,
    "relax": {"rank": {"split": "measured"}, "init": "joint", "vectors": "own"},
}
RECIPES = {
    "factors": LOWRANK,
    "activations": {**SMALL, "factor": {"parameters": 0.5, "split": "measured"}},
    "together": TOGETHER,
    "together-svd": {**TOGETHER, "relax": {"rank": {"split": "measured"}, "init": "svd"}},
    "three-loops": {**TOGETHER, "fold": {"loops": 4}},
    "loras-even": {**LOWRANK, "fold": FOLD, "relax": {"rank": 2}, "factor": {**LOWRANK["factor"], "parameters": 0.5}},
    "basis": {**LOWRANK, "fold": FOLD, "factor": {**LOWRANK["factor"], "parameters": 0.5, "share": "basis"}},
    "basis-activations-ends": {
        **SMALL,
        "fold": {"loops": 2, "prelude": 1, "coda": 1},
        "relax": {"rank": 2},
        "factor": {"parameters": 0.6, "split": "measured", "share": "basis"},
    },
    "mixers": {**TOGETHER, "mixers": [{"type": "retention", "depths": [1, 3]}]},
}


@pytest.fixture(scope="module")
def source(make_model: Callable[..., Path]) -> Path:
    return make_model("llama", hidden_size=48, intermediate_size=96)


def linear_parameters(folder: Path) -> int:
    """Numbers of linears with their factors and LoRAs, by the file itself."""
    return sum(
        each.numel()
        for name, each in load_file(folder / "model.safetensors").items()
        if each.ndim == 2 and not name.startswith(("model.embed_tokens", "lm_head"))
    )


@pytest.mark.parametrize("name", RECIPES)
def test_the_folder_has_the_size_asked_for(source, text, tmp_path, name):
    recipe = RECIPES[name]
    steps = []
    made = convert(
        source,
        tmp_path / "out",
        recipe,
        options=ConvertOptions(allow_larger=True, progress=lambda done, total: steps.append((done, total))),
        calibration=text,
    )
    assert read_plan(tmp_path / "out" / "plan.json") == made
    assert not (tmp_path / "out" / SCRATCH_NAME).exists()
    budget = linear_budget(identity_blueprint(made.blueprint.arch), recipe["factor"]["parameters"])
    whole = sum(rows * columns for *_, (rows, columns) in stored_linears(made.blueprint))
    held = linear_parameters(tmp_path / "out")
    assert held <= budget
    if whole + lora_parameters(made.blueprint) > budget:
        assert held >= 0.98 * budget if name == "mixers" else held >= 0.99 * budget
    assert not any(note.startswith(UNMEASURED_RANKS) for note in map(str, made.notes))
    assert any(note == f"calibration text: {text}" for note in map(str, made.notes))
    # Rounds of measuring and writing count up to one sum.
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == steps[-1][1]
    with torch.no_grad():
        assert load_model(tmp_path / "out", device="cpu")(torch.arange(20)[None] + 3).logits.isfinite().all()


@pytest.mark.parametrize("recipe", [LOWRANK, TOGETHER], ids=["factors", "together"])
def test_twice_gives_the_same_bytes(source, text, tmp_path, recipe):
    for name in ("one", "two"):
        convert(source, tmp_path / name, recipe, options=ConvertOptions(allow_larger=True), calibration=text)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()


def test_measured_factors_follow_the_weights_and_even_ones_do_not(source, text, tmp_path):
    made = convert(source, tmp_path / "out", LOWRANK, calibration=text)
    shares = {
        part.factors.get(name, 0)
        for part in (*made.blueprint.mixers, *made.blueprint.mlps)
        for name in ("q_proj", "o_proj", "down_proj")
    }
    assert len(shares) > 3
    even = plan(source, LOWRANK).blueprint
    assert len({part.factors["q_proj"] for part in even.mixers}) == 1


def test_measured_bases_follow_the_weights(source, text, tmp_path):
    made = convert(source, tmp_path / "out", RECIPES["basis"], calibration=text)
    ranks = {part.bases[name] for part in made.blueprint.mixers for name in ("q_proj", "o_proj")}
    assert len(ranks) == 4
    assert not any(part.factors for part in (*made.blueprint.mixers, *made.blueprint.mlps))
    even = plan(source, RECIPES["basis"]).blueprint
    assert len({part.bases["q_proj"] for part in even.mixers}) == 1


@pytest.mark.parametrize("init", ["svd", "joint"])
@pytest.mark.parametrize("weight", ["none", "activations"])
@pytest.mark.parametrize("energy", [0.4, 0.9])
def test_loras_keep_the_energy_asked_for(source, text, tmp_path, init, weight, energy):
    relax = {"rank": {"energy": energy}, "init": init, "weight": weight}
    recipe = {**SMALL, "fold": FOLD, "relax": relax}
    calibration = None if weight == "none" else text
    made = convert(source, tmp_path / "out", recipe, options=ConvertOptions(allow_larger=True), calibration=calibration)
    assert made.kept_energy
    if init == "svd":
        assert all(energy - 1e-4 <= kept for kept in made.kept_energy.values())
        # No more than one direction above: the smallest ranks.
        assert min(made.kept_energy.values()) < energy + 0.1
    ranks = {rank for depth in made.blueprint.depths for rank in depth.ranks.values()}
    assert len(ranks) > 1
    assert max(ranks) < 48


@pytest.mark.parametrize("init", ["stepwise", "average", "upper"])
def test_energy_is_measured_against_the_weight_that_is_stored(source, tmp_path, init):
    recipe = {"fold": {**FOLD, "init": init}, "relax": {"rank": {"energy": 0.6}, "init": "svd"}}
    made = convert(source, tmp_path / "out", recipe, options=ConvertOptions(allow_larger=True))
    found = [made.kept_energy.get(f"depths.{depth}.q_proj") for depth in range(4)]
    assert all(kept is None or kept >= 0.6 - 1e-4 for kept in found)
    if init != "average":
        # A depth whose own layer is stored has nothing to correct.
        assert any("q_proj" not in depth.ranks for depth in made.blueprint.depths)


def test_a_factored_model_needs_healing(source):
    assert plan(source, {"factor": {"parameters": 0.5}}).needs_healing
    assert not plan(source, {"factor": {"parameters": 1.5}}, allow_larger=True).needs_healing


def test_a_share_for_loras_is_spent_where_it_saves_most(source, tmp_path):
    share = 0.1
    recipe = {"fold": FOLD, "relax": {"rank": {"parameters": share, "split": "measured"}}}
    made = convert(source, tmp_path / "out", recipe, options=ConvertOptions(allow_larger=True))
    budget = share * made.cost.source.non_embedding_parameters
    assert 0.97 * budget <= lora_parameters(made.blueprint) <= budget


def test_a_budget_below_the_smallest_ranks_leaves_nothing_behind(source, text, tmp_path):
    recipe = {**LOWRANK, "factor": {**LOWRANK["factor"], "parameters": 0.1}, "fold": FOLD, "relax": {"rank": 1}}
    with pytest.raises(RecipeError, match=r"factor\.parameters.*(required)"):
        convert(source, tmp_path / "out", {**recipe, "factor": {"parameters": 0.02}}, calibration=text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weight", ["activations", "fisher"])
def test_text_is_required_where_errors_are_weighed_by_some(source, tmp_path, weight):
    recipe = {"factor": {"parameters": 0.5, "weight": weight}}
    with pytest.raises(RecipeError, match=rf"weight: calibration text is required for `weight: {weight}` \(got none\)"):
        convert(source, tmp_path / "out", recipe)
    assert not list(tmp_path.iterdir())


def test_text_that_nothing_uses_is_refused(source, text, tmp_path):
    for recipe in ({"fold": FOLD}, {"factor": {"parameters": 0.5, "weight": "none"}}):
        with pytest.raises(RecipeError, match=r"calibration: this recipe does not use calibration text"):
            convert(source, tmp_path / "out", recipe, calibration=text)


def test_text_too_short_is_refused_and_leaves_nothing_behind(source, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(DataError, match=r"calibration: at least \d+ tokens of text are required"):
        convert(source, tmp_path / "out", LOWRANK, calibration=tmp_path / "short.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize("weight", ["activations", "fisher"])
def test_weighing_changes_what_is_stored(source, text, tmp_path, weight):
    convert(source, tmp_path / "plain", {"factor": {"parameters": 0.5, "weight": "none"}})
    recipe = {**SMALL, "factor": {"parameters": 0.5, "weight": weight}}
    convert(source, tmp_path / "weighed", recipe, calibration=text)
    plain, weighed = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "weighed"))
    assert plain.keys() == weighed.keys()
    for linear in ("mixers.1.q_proj", "mlps.2.down_proj"):
        one, other = (held[f"model.{linear}.b.weight"] @ held[f"model.{linear}.a.weight"] for held in (plain, weighed))
        assert not torch.allclose(one, other, atol=1e-2)


def test_a_mixture_is_measured_by_weight_and_one_kind_has_a_note(source, tmp_path, sentences):
    kinds = [[f"{sentence} {number}" for number in range(40) for sentence in sentences], ["1 2 3 4 5 6 7 8 " * 400]]
    made = {}
    for name, data in {
        "one": kinds[0],
        "mixed": Mixture([(kinds[0], 1), (kinds[1], 1)]),
        "again": Mixture([(kinds[0], 2), (kinds[1], 2)]),
        "frame": pandas.DataFrame({"text": kinds[0]}),
        "generator": (text for text in kinds[0]),
    }.items():
        plan_ = convert(source, tmp_path / name, RECIPES["factors"], calibration=data)
        prices = [note for note in map(str, plan_.notes) if "0.65 on documentation" in note]
        assert len(prices) == (name not in ("mixed", "again"))
        made[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert made["one"] == made["frame"] == made["generator"]
    assert made["mixed"] == made["again"] != made["one"]
