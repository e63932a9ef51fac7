"""Folders of an earlier version with all mixers in one stack: former tensor names, `options` in the config."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from refold.blueprint.schema import Blueprint
from refold.checkpoint.reader import CheckpointReader
from refold.conversion.inspect import inspect
from refold.errors import FolderError
from refold.mixers.mamba import Mamba
from refold.modeling.adapters import load_adapters
from refold.modeling.load import load_model
from refold.modeling.model import RefoldForCausalLM
from refold.planning.plan import read_plan

FOLDERS = Path(__file__).parent / "former_folders"
KINDS = ("own", "tied", "basis")
"""Own vectors and LoRAs; tied vectors, factors and LoRAs; bases with coefficients."""
TOKENS = torch.arange(20)[None] % 24


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def current(name: str) -> str:
    """The name of Mamba's tensors now, by a list written out; the test's stack has it in part 0, at depths 0 and 7."""
    owners = ("model.mixers.0.", "model.depths.0.", "model.depths.7.")
    if name.startswith(owners):
        pieces = {"v_proj": "in_proj_x", "g_proj": "in_proj_z", "select_proj": "x_proj", "o_proj": "out_proj"}
        name = ".".join(pieces.get(piece, piece) for piece in name.split("."))
    for old, new in (
        ("decay.a_log", "A_log"),
        ("decay.dt_bias", "dt_bias"),
        ("skip.d", "D"),
        (".conv.", ".conv1d."),
        ("decay_down_proj", "gk_proj_down"),
        ("decay_up_proj", "gk_proj_up"),
        ("beta_proj", "b_proj"),
        ("decay_proj", "a_proj"),
    ):
        name = name.replace(old, new)
    return name


def stored(kind: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDERS / kind / "model.safetensors")


@torch.no_grad()
def test_every_tensor_keeps_its_bits_and_the_logits_are_those_of_then(kind: str) -> None:
    model = load_model(FOLDERS / kind)
    given, found = stored(kind), model.state_dict()
    assert {current(name) for name in given} == found.keys()
    assert all(torch.equal(found[current(name)], tensor) for name, tensor in given.items())
    expected = load_file(FOLDERS / f"{kind}.logits.safetensors")["logits"]
    # In float64, because processors differ in float32; the stored logits are off by their own rounding.
    found_logits = model.double()(TOKENS).logits
    torch.testing.assert_close(found_logits, expected.double(), rtol=0, atol=2e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_all_ways_of_loading_know_the_names(kind: str) -> None:
    expected = load_model(FOLDERS / kind)(TOKENS).logits
    for cls in (AutoModelForCausalLM, RefoldForCausalLM):
        assert torch.equal(cls.from_pretrained(FOLDERS / kind).eval()(TOKENS).logits, expected)


@torch.no_grad()
def test_saved_again_it_has_todays_names(kind: str, tmp_path: Path) -> None:
    model = load_model(FOLDERS / kind)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    blueprint = json.loads((tmp_path / "config.json").read_text())["blueprint"]
    assert not blueprint["mixers"][0].keys() & {"type", "options"}
    assert torch.equal(load_model(tmp_path)(TOKENS).logits, model(TOKENS).logits)


def test_a_reader_gives_tensors_by_todays_names(kind: str) -> None:
    config = json.loads((FOLDERS / kind / "config.json").read_text())
    given = stored(kind)
    with CheckpointReader(FOLDERS / kind, Blueprint.model_validate(config["blueprint"])) as reader:
        assert set(reader.names()) == {current(name) for name in given}
        for name, tensor in given.items():
            assert torch.equal(reader.read(current(name)), tensor)
        assert not reader.unread()


def test_adapters_of_a_former_folder_are_taken(tmp_path: Path) -> None:
    other = shutil.copytree(FOLDERS / "own", tmp_path / "other")
    model = load_model(FOLDERS / "own")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora." in name:
                parameter.zero_()
    assert load_adapters(model, other) > 0
    assert torch.equal(model(TOKENS).logits, load_model(other)(TOKENS).logits)


def test_plan_and_inspection_read_it() -> None:
    plan = read_plan(FOLDERS / "own" / "plan.json")
    config = json.loads((FOLDERS / "own" / "config.json").read_text())
    assert plan.blueprint == Blueprint.model_validate(config["blueprint"])
    assert inspect(FOLDERS / "own").blueprint == plan.blueprint


def test_without_the_former_names_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mamba, "former_names", {})
    with pytest.raises(FolderError, match="weights must be those of its blueprint"):
        load_model(FOLDERS / "tied")
