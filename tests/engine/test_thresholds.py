"""Thresholds beside a model: written whole, read whole, refused for another model."""

import hashlib
import json
import shutil

import pytest
import torch

from refold.checkpoint.companions import is_companion
from refold.checkpoint.manifest import EXITS_NAME, MANIFEST_NAME, check, verify, write_manifest
from refold.conversion.convert import ConvertOptions, convert
from refold.engine.engine import Engine
from refold.engine.settings import EngineSettings
from refold.engine.thresholds import (
    ExitThreshold,
    Thresholds,
    ToleranceLevel,
    load_rule,
    load_thresholds,
    make_rule,
    model_fingerprint,
    read_thresholds,
    require_free_thresholds,
)
from refold.errors import FolderError, RefoldError
from refold.generation.sampling import Sampling
from refold.healing.heal import heal
from refold.modeling.load import load_model
from refold.recipe.heal import HealStage

RECIPE = {"fold": {"loops": 2}, "exits": {"gate": True}}


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory):
    made = tmp_path_factory.mktemp("folded") / "model"
    convert(make_model("llama"), made, RECIPE, options=ConvertOptions(allow_larger=True))
    return made


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, device="cpu")


@pytest.fixture
def own(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "own")


def level(tolerance, threshold=0.8, **fields):
    """The thresholds for one tolerance."""
    plain = {"leaves": 0.5, "differs": 0.004, "bound": 0.009}
    exits = (ExitThreshold(depths=2, threshold=threshold, **{**plain, **fields}),)
    return ToleranceLevel(tolerance=tolerance, exits=exits, live=None)


def thresholds(model, **fields):
    plain = {
        "measure": "gate",
        "kv": "recompute",
        "tolerance": 0.01,
        "confidence": 0.95,
        "levels": (level(0.01),),
        "documents": 400,
        "tokens": 40_000,
        "context": 512,
        "corpus": "f" * 64,
        "model": model_fingerprint(model),
    }
    return Thresholds(**{**plain, **fields})


def test_what_is_written_is_read_and_the_folder_stays_whole(own, model):
    before = (own / MANIFEST_NAME).read_bytes()
    written = thresholds(model)
    assert written.write(own) == own / EXITS_NAME
    assert read_thresholds(own) == read_thresholds(own / EXITS_NAME) == written
    assert (written.level.leaves, written.level.differs) == (0.5, 0.004)
    check(own)
    assert verify(own) == ()
    write_manifest(own)
    assert (own / MANIFEST_NAME).read_bytes() == before


@pytest.mark.parametrize("weights", ["auto", "bfloat16", "int8"])
def test_an_engine_takes_the_exits_of_the_folder_whatever_its_weights(own, model, weights):
    thresholds(model, levels=(level(0.01, threshold=0.0, leaves=1.0),)).write(own)
    engine = Engine(own, EngineSettings(weights=weights, exits="calibrated", max_pending=99), device="cpu")
    found = engine.generate([[5, 6, 7, 8]], Sampling(max_new_tokens=5, ignore_eos=True))[0]
    assert set(found.choices[0].depths) == {2}
    with pytest.raises(RefoldError, match="kv"):
        Engine(own, EngineSettings(exits="calibrated", kv="propagate"), device="cpu")


def test_an_engine_serves_thresholds_with_the_keys_they_were_measured_with(own, model):
    thresholds(model, kv="propagate").write(own)
    assert Engine(own, EngineSettings(exits="calibrated"), device="cpu").kv == "propagate"


def test_the_file_has_no_date_and_no_path(own, model):
    one = thresholds(model).write(own).read_bytes()
    assert thresholds(model).write(own, overwrite=True).read_bytes() == one
    assert str(own).encode() not in one


def test_a_copied_folder_keeps_its_thresholds_and_a_new_model_gets_none(own, model, tmp_path, sentences):
    thresholds(model).write(own)
    copied = shutil.copytree(own, tmp_path / "copied")
    loaded = load_model(copied, device="cpu")
    assert load_thresholds(loaded, "calibrated") == thresholds(model)
    stage = HealStage.model_validate({"objective": "next_token", "tokens": 64, "context": 16, "batch_tokens": 16})
    heal(copied, tmp_path / "healed", list(sentences), [stage])
    assert not (tmp_path / "healed" / EXITS_NAME).exists()
    assert not is_companion(EXITS_NAME)


def test_thresholds_of_another_model_are_refused(own, model, tmp_path):
    thresholds(model).write(own)
    with torch.no_grad():
        changed = load_model(own, device="cpu")
        changed.model.norm.weight[3] += 1e-3
    with pytest.raises(RefoldError, match=r"own: thresholds of this model are required \(got those of another model"):
        load_rule(changed, "calibrated")
    with pytest.raises(RefoldError, match="exits: thresholds of this model are required"):
        load_rule(changed, thresholds(model))
    load_rule(model, own / EXITS_NAME)


def test_a_model_widened_in_memory_is_the_same_and_a_rounded_one_is_not(make_source, tmp_path):
    convert(
        make_source("llama", dtype="bfloat16"), tmp_path / "half", RECIPE, options=ConvertOptions(allow_larger=True)
    )
    stored = load_model(tmp_path / "half", device="cpu", dtype="bfloat16")
    wide = load_model(tmp_path / "half", device="cpu", dtype="float32")
    assert model_fingerprint(stored) == model_fingerprint(wide)
    with torch.no_grad():
        wide.model.norm.weight[0] += 1e-5
    rounded = model_fingerprint(wide.bfloat16())
    assert rounded == model_fingerprint(stored)
    with torch.no_grad():
        wide.model.norm.weight[0] *= 1.5
    assert model_fingerprint(wide) != rounded


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "readable JSON is required"),
        (lambda text: "", "readable JSON is required"),
        (lambda text: "[]", "exit thresholds are required"),
        (lambda text: text.replace("0.8", "0.7"), "their sha256 does not fit"),
        (lambda text: text.replace('"threshold": 0.8', '"threshold": 1.8'), "exits.0.threshold: .* less than or equal"),
        (lambda text: text.replace('"format": 2', '"format": 3'), r"format 1 or 2 .* is required \(got 3\)"),
        (lambda text: text.replace('"kv": "recompute",', ""), "kv: Field required"),
    ],
)
def test_a_damaged_file_is_refused_by_name(own, model, damage, message):
    path = thresholds(model).write(own)
    path.write_text(damage(path.read_text()))
    with pytest.raises(FolderError, match=f"exits.json: .*{message}"):
        load_rule(model, own)
    # It is still refold's, and can be made again.
    thresholds(model).write(own, overwrite=True)
    read_thresholds(own)


def test_a_model_without_thresholds_says_how_to_get_some(own):
    with pytest.raises(FolderError, match="run `refold calibrate` first, or run the full depth"):
        load_rule(load_model(own, device="cpu"), "calibrated")


def test_a_model_made_in_memory_has_no_folder(folder):
    loaded = load_model(folder, device="cpu")
    loaded.config._name_or_path = ""
    with pytest.raises(RefoldError, match="exits: a model loaded from a folder is required for 'calibrated'"):
        load_rule(loaded, "calibrated")


def test_files_are_replaced_only_if_asked_and_only_thresholds(own, model, tmp_path):
    thresholds(model).write(own)
    with pytest.raises(FolderError, match="a new file is required"):
        require_free_thresholds(own)
    require_free_thresholds(own, overwrite=True)
    with pytest.raises(FolderError, match="a file of exit thresholds is required to be overwritten"):
        require_free_thresholds(own / "config.json", overwrite=True)


def test_thresholds_hold_for_equal_keys_alone(model):
    exact, propagated = thresholds(model), thresholds(model, kv="propagate")
    exact.require_policy("shared")
    propagated.require_policy("propagate")
    with pytest.raises(RefoldError, match="exits: thresholds measured with kv propagate are required"):
        exact.require_policy("propagate")
    with pytest.raises(RefoldError, match=r"got kv propagate\); serve with kv propagate"):
        propagated.require_policy("recompute")


def test_exits_without_a_threshold_are_passed_unless_the_next_one_asks_them():
    limits = {2: None, 4: 0.9}
    assert make_rule("top1", limits).thresholds == {4: 0.9}
    assert make_rule("agreement", limits).thresholds == {2: float("inf"), 4: 0.9}


def test_no_field_is_beyond_what_it_counts(own, model):
    content = json.loads(thresholds(model).write(own).read_text())
    assert content["levels"][0]["exits"][0] == {
        "depths": 2,
        "threshold": 0.8,
        "leaves": 0.5,
        "differs": 0.004,
        "bound": 0.009,
    }
    with pytest.raises(ValueError, match="tolerance"):
        thresholds(model, tolerance=1.0)
    with pytest.raises(ValueError, match="measure"):
        thresholds(model, measure="luck")


def test_a_file_of_one_tolerance_still_loads(own, model):
    """Format 1 had the figures of its only tolerance beside the others."""
    new = json.loads(thresholds(model).write(own).read_text())
    old = {name: value for name, value in new.items() if name not in ("levels", "sha256", "format")}
    old = {**old, **new["levels"][0], "format": 1}
    digest = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    (own / EXITS_NAME).write_text(json.dumps({**old, "sha256": digest}))
    assert read_thresholds(own) == thresholds(model)
    (own / EXITS_NAME).write_text(json.dumps({**old, "skewed": 0.5, "sha256": digest}))
    with pytest.raises(FolderError, match="their sha256 does not fit"):
        read_thresholds(own)


def test_levels_go_from_small_to_large_and_have_the_default(model):
    both = thresholds(model, levels=(level(0.01), level(0.05, threshold=0.3)), tolerance=0.05)
    assert both.level.tolerance == 0.05
    assert both.rule().thresholds == {2: 0.3}
    assert both.rule(0.01).thresholds == {2: 0.8}
    with pytest.raises(ValueError, match="from small to large"):
        thresholds(model, levels=(level(0.05), level(0.01)))
    with pytest.raises(ValueError, match="one of the levels"):
        thresholds(model, tolerance=0.02)
