"""Healing of models with replaced attention, by every protocol for them."""

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch

from refold.conversion.convert import ConvertOptions, convert
from refold.healing.groups import Trainable, WeightGroups
from refold.healing.optimizer import make_optimizers
from refold.modeling.adapters import load_adapters
from refold.modeling.load import load_model
from refold.recipe.heal import HealStage
from refold.recipe.load import load_recipe

SMALL = {"context": 16, "batch_tokens": 64, "micro_batch": 4}
LOLCATS = {
    "mixers": [{"type": "linear_attention", "window": 4}],
    "relax": {"at": "all", "rank": {"q_proj": 2, "o_proj": 2}, "init": "zero"},
}


@pytest.fixture
def swapped(source: Path, tmp_path: Path) -> Callable[..., Path]:
    """Converts the source with mixers."""

    def make(recipe: dict[str, Any]) -> Path:
        convert(source, tmp_path / "swapped", recipe, options=ConvertOptions(allow_larger=True))
        return tmp_path / "swapped"

    return make


def stages_of(protocol: str, tokens: int, **changes: Any) -> list[HealStage]:
    stages = load_recipe({"heal": {"protocol": protocol, "tokens": tokens}}).heal
    return [stage.model_copy(update={**SMALL, **changes}) for stage in stages]


@pytest.mark.parametrize("mixer", ["retention", "mamba2", "gla", "gated_deltanet", "mamba"])
def test_transferred_weights_wait_until_the_loss_says_so(healing, swapped, weights, mixer):
    transfer = ["mlp"] if mixer == "mamba" else ["o_proj", "mlp"]
    folder = swapped({"mixers": [{"type": mixer, "transfer": transfer}]})
    (stage,) = stages_of("xatl", 12 * 64, learning_rate=3e-3)
    assert stage.thaw is not None
    thaw = stage.thaw.model_copy(update={"window": 0.1, "latest": 0.75})
    healing(model=folder, stages=[stage.model_copy(update={"thaw": thaw})])
    frozen = [record.frozen for record in healing.records]
    assert frozen[0]
    assert not frozen[-1]
    assert frozen == sorted(frozen, reverse=True)
    assert healing.records[-1].loss < healing.records[0].loss
    start, after = weights(folder), weights(healing.destination)
    assert not torch.equal(start["model.mlps.0.up_proj.weight"], after["model.mlps.0.up_proj.weight"])


@pytest.mark.parametrize("mixer", ["retention", "gated_deltanet", "linear_attention"])
def test_mixers_learn_what_attention_gave_before_the_whole_learns(healing, swapped, mixer):
    folder = swapped({"mixers": [{"type": mixer, "transfer": "all", "except": [1]}]})
    healing(model=folder, stages=stages_of("align-then-distil", 20 * 64, learning_rate=3e-3))
    of_stages = [[record.loss for record in healing.records if record.stage == stage] for stage in (1, 2, 3)]
    assert of_stages[0][-1] < of_stages[0][0]
    assert [len(losses) for losses in of_stages] == [4, 12, 4]
    assert all(isfinite(loss) for losses in of_stages for loss in losses)


def test_lolcats_trains_maps_and_then_adapters_alone(healing, swapped, weights):
    folder = swapped(LOLCATS)
    healing(model=folder, stages=stages_of("lolcats", 12 * 64))
    start, after = weights(folder), weights(healing.destination)
    moved = {name for name in start if not torch.equal(start[name], after[name])}
    kinds = {"map" if "_map" in name or "blend" in name else "lora" if ".lora." in name else name for name in moved}
    assert kinds == {"map", "lora"}


@pytest.mark.parametrize("mixer", ["retention", "mamba2", "gla", "gated_deltanet", "linear_attention"])
def test_mixing_matrices_come_nearer_to_attention(healing, swapped, mixer):
    folder = swapped({"mixers": [{"type": mixer, "transfer": "all"}]})
    stage = healing.stage(objective="attention_matrices", tokens=12 * 64, train=["mixers"], learning_rate=3e-3)
    healing(model=folder, stages=[stage])
    assert healing.records[-1].loss < healing.records[0].loss


def test_vectors_of_mixers_neither_decay_nor_are_orthogonalised(swapped):
    recipe = {"mixers": [{"type": "mamba", "transfer": ["mlp"], "depths": [0]}, {"type": "mamba2", "depths": [1]}]}
    folder = swapped(recipe)
    model = load_model(folder, dtype="float32", device="cpu")
    stage = HealStage(tokens=1, optimizer="muon", weight_decay=0.1)
    optimizers = make_optimizers(model, stage, Trainable(stage, WeightGroups(model, folder)))
    decayed = {
        id(p) for each in optimizers for group in each.param_groups if group["weight_decay"] for p in group["params"]
    }
    muon = {id(p) for group in optimizers[-1].param_groups for p in group["params"]}
    for name in ("0.A_log", "0.conv1d.weight", "1.conv1d.weight", "1.dt_bias"):
        assert id(model.get_parameter(f"model.mixers.{name}")) not in decayed | muon, name
    assert id(model.get_parameter("model.mixers.0.x_proj.weight")) in decayed & muon


def test_a_model_with_shared_keys_heals(healing, swapped, weights):
    folder = swapped({"fold": {"loops": 2}, "share_kv": {"from": "first_loop"}})
    healing(model=folder, stages=[healing.stage(tokens=24 * 64, learning_rate=3e-3)])
    assert healing.records[-1].loss < healing.records[0].loss
    start, after = weights(folder), weights(healing.destination)
    assert not [name for name in start if torch.equal(start[name], after[name])]
    shared = WeightGroups(load_model(folder, device="cpu"), folder).find("shared", "train")
    # Only depths of the first loop make keys and values.
    assert "model.mixers.0.q_proj.weight" in shared
    assert "model.mixers.0.k_proj.weight" not in shared


def test_prefixes_heal_alone_and_do_not_decay(healing, swapped, weights):
    folder = swapped({"fold": {"loops": 2}, "relax": {"type": "prefix", "length": 4}})
    stage = healing.stage(tokens=24 * 64, learning_rate=3e-2, train=["adapters"], optimizer="muon", weight_decay=0.1)
    healing(model=folder, stages=[stage])
    assert healing.records[-1].loss < healing.records[0].loss
    start, after = weights(folder), weights(healing.destination)
    moved = {name for name in start if not torch.equal(start[name], after[name])}
    assert moved == {f"model.depths.{depth}.prefix" for depth in range(4)}
    model = load_model(folder, dtype="float32", device="cpu")
    (optimizer,) = make_optimizers(model, stage, Trainable(stage, WeightGroups(model, folder)))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    assert load_adapters(model, healing.destination) == 4
    assert torch.equal(model.get_parameter("model.depths.2.prefix"), after["model.depths.2.prefix"].float())
