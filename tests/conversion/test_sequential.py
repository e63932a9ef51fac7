"""Linears fitted in sequence, against their required outputs on the calibration text."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from refold.checkpoint.locate import locate
from refold.conversion.convert import SCRATCH_NAME, ConvertOptions, carry_out, convert
from refold.conversion.measured import keep_moments, pack_text
from refold.data.packing import PackedSequence
from refold.data.readers import open_data
from refold.errors import RecipeError
from refold.modeling.load import load_model
from refold.planning.plan import plan
from refold.sources.source_model import read_source_model

CALIBRATION = {"tokens": 512, "context": 32, "order": "sequential"}
AT_ONCE = {**CALIBRATION, "order": "at_once"}
JOINT = {
    "fold": {"loops": 2},
    "relax": {"rank": 6, "init": "joint", "vectors": "own", "weight": "activations"},
}
RECIPES = {
    "joint": JOINT,
    "three-svd": {
        "fold": {"loops": 3, "prelude": 1},
        "relax": {"rank": 6, "init": "svd", "weight": "activations"},
        "share_kv": [{"depth": 2, "from": 1}],
    },
    "factors": {"factor": {"parameters": 0.6}, "drop": {"attention": {"layers": [1]}}},
    "compact": {
        "fold": {"loops": 2},
        "relax": {"rank": {"split": "measured"}, "init": "joint", "vectors": "own"},
        "factor": {"parameters": 0.6, "split": "measured", "weight": "fisher"},
    },
    "mixers": {"mixers": [{"type": "retention", "depths": [1]}], "factor": {"parameters": 0.8}},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, sentences: tuple[str, ...]) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(sentences * 40))
    return path


@pytest.fixture(scope="module")
def source(make_model: Callable[..., Path]) -> Path:
    return make_model("llama", hidden_size=48, intermediate_size=96)


def tokens(source: Path, text: Path) -> PackedSequence:
    made = plan(source, {"calibration": CALIBRATION, **RECIPES["factors"]})
    return pack_text(read_source_model(source), open_data(text), made.recipe)


def last_stream(folder: Path, packed: PackedSequence) -> Tensor:
    """The stream behind the last depth, normed."""
    with torch.no_grad():
        return load_model(folder, device="cpu").model(packed.input_ids, position_ids=packed.position_ids)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_fitted_in_sequence_ends_nearer_to_the_source(source, text, tmp_path, name):
    packed, off = tokens(source, text), {}
    convert(source, tmp_path / "source", options=ConvertOptions(allow_larger=True))
    theirs = last_stream(tmp_path / "source", packed)
    for out, calibration in (("sequential", CALIBRATION), ("at-once", AT_ONCE)):
        steps = []
        made = convert(
            source,
            tmp_path / out,
            {**RECIPES[name], "calibration": calibration},
            options=ConvertOptions(
                allow_larger=True, progress=lambda done, total, steps=steps: steps.append((done, total))
            ),
            calibration=text,
        )
        assert [done for done, _ in steps] == sorted({done for done, _ in steps})
        assert steps[-1][0] == steps[-1][1]
        assert not (tmp_path / out / SCRATCH_NAME).exists()
        assert all(0 <= kept <= 1 for kept in made.kept_energy.values())
        off[out] = float((last_stream(tmp_path / out, packed) - theirs).square().mean())
    assert off["sequential"] < 0.97 * off["at-once"]


def test_a_fold_that_loses_nothing_stays_exact(source, text, tmp_path):
    recipe = {**JOINT, "relax": {**JOINT["relax"], "rank": "full"}, "calibration": CALIBRATION}
    convert(source, tmp_path / "folded", recipe, options=ConvertOptions(allow_larger=True), calibration=text)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        found = load_model(tmp_path / "folded", device="cpu")(ids).logits
        expected = AutoModelForCausalLM.from_pretrained(source)(ids).logits
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))


def test_the_first_depth_is_fitted_as_at_once_and_the_next_is_not(source, text, tmp_path):
    for out, calibration in (("sequential", CALIBRATION), ("again", CALIBRATION), ("at-once", AT_ONCE)):
        recipe = {"factor": {"parameters": 0.6}, "calibration": calibration}
        convert(source, tmp_path / out, recipe, calibration=text)
    found, again, at_once = (
        load_file(tmp_path / out / "model.safetensors") for out in ("sequential", "again", "at-once")
    )
    assert all(torch.equal(value, again[name]) for name, value in found.items())

    def off(linear: str) -> float:
        one, other = (each[f"model.{linear}.b.weight"] @ each[f"model.{linear}.a.weight"] for each in (found, at_once))
        return float((one - other).norm() / other.norm())

    # The first queries, keys and values see what they see in the source; nothing behind them does.
    assert all(off(f"mixers.0.{linear}") < 1e-3 for linear in ("q_proj", "k_proj", "v_proj"))
    behind = ("mixers.0.o_proj", "mlps.0.gate_proj", "mlps.0.down_proj", "mixers.1.q_proj", "mlps.3.down_proj")
    assert all(off(linear) > 0.02 for linear in behind)


def test_only_what_is_weighed_is_fitted_in_sequence(source):
    order = {"calibration": {"order": "sequential"}}
    for recipe in ({}, {"fold": {"loops": 2}, "relax": {"rank": 4}}, {"factor": {"parameters": 0.5, "weight": "none"}}):
        with pytest.raises(
            RecipeError,
            match=r"calibration\.order: sequential requires linears weighted .* \(got weight: none\); set relax",
        ):
            plan(source, {**order, **recipe})
    with pytest.raises(RecipeError, match=r"calibration\.order: .*\(got fresh weights\)"):
        plan(source, {**order, "weights": "fresh", "factor": {"parameters": 0.5}})


def test_two_sequences_are_required_and_enough(source, text, tmp_path):
    recipe = {"factor": {"parameters": 0.6}, "calibration": {**CALIBRATION, "tokens": 63}}
    with pytest.raises(
        RecipeError, match=r"calibration\.tokens: sequential requires two sequences of 32 tokens.*\(got 63 tokens\)"
    ):
        plan(source, recipe)
    plan(source, {**recipe, "calibration": {**AT_ONCE, "tokens": 63}})
    calibration = {**CALIBRATION, "tokens": 64}
    convert(source, tmp_path / "out", {**recipe, "calibration": calibration}, calibration=text)


def test_moments_are_no_substitute_for_text(source, text, tmp_path):
    recipe = {"factor": {"parameters": 0.6}, "calibration": CALIBRATION}
    keep_moments(source, recipe, open_data(text), tmp_path / "moments")
    made = plan(source, recipe)
    with pytest.raises(RecipeError, match=r"calibration\.order: calibration text is required for sequential"):
        carry_out(made, locate(source), tmp_path / "out", moments=tmp_path / "moments")
    assert not (tmp_path / "out").exists()
