"""Healing of models whose tied linears share a basis."""

import pytest
import torch

from refold.conversion.convert import ConvertOptions, convert
from refold.errors import HealError
from refold.healing.groups import WeightGroups
from refold.modeling.load import load_model

RECIPE = {"fold": {"loops": 2, "prelude": 2}, "factor": {"parameters": 0.6, "weight": "none", "share": "basis"}}


@pytest.fixture(scope="module")
def shared(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "model"
    convert(source, folder, RECIPE, options=ConvertOptions(allow_larger=True))
    return folder


def test_bases_and_coefficients_train_and_the_loss_falls(healing, shared, weights):
    healing({"tokens": 30 * 64}, model=shared)
    assert healing.records[-1].loss < 0.9 * healing.records[0].loss
    before, after = weights(shared), weights(healing.destination)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_the_shared_are_the_bases_and_train_alone(healing, shared, weights):
    healing({"train": ["shared"]}, model=shared)
    before, after = weights(shared), weights(healing.destination)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # Of four layers the first two are not tied; norms are each depth's own.
    names = {f"model.mixers.2.{name}_proj.a.weight" for name in "qkvo"}
    names |= {f"model.mlps.2.{name}_proj.a.weight" for name in ("gate", "up", "down")}
    assert moved == names


def test_coefficients_are_weights_of_their_depth_and_no_adapters(healing, shared):
    groups = WeightGroups(load_model(shared, device="cpu"), shared)
    assert not groups.find("adapters", "train")
    assert "model.depths.3.coefficients.up_proj" in groups.find("mlps", "train") & groups.find("transferred", "train")
    assert len(groups.find("model.depths.*.coefficients.*", "train")) == 14
    with pytest.raises(HealError, match=r"train: at least one weight to train from the start is required"):
        healing({"train": ["adapters"]}, model=shared)
