"""Gains: initialised with 1, one number per update of the residual stream, merged into the last weights of a part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from refold.blueprint.schema import Blueprint
from refold.exporting.export import export
from refold.healing.groups import Trainable, WeightGroups
from refold.healing.optimizer import make_optimizers
from refold.modeling.load import load_model
from refold.recipe.heal import HealStage

GAINS = {"fold": {"loops": 2}, "relax": {"rank": 3, "gain": "own"}}
OWN = {"fold": {"loops": 2}, "relax": {"rank": 3, "gain": "own", "vectors": "own"}}
BASES = {**GAINS, "factor": {"parameters": 0.6, "weight": "none", "share": "basis"}}
NO_ATTENTION = {**GAINS, "drop": {"attention": {"layers": [1]}}}
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama-mha-bias", GAINS),
    ("llama-mqa-mlp-bias", OWN),
    ("gpt_neox", OWN),
    ("gpt_neox-sequential", GAINS),
    ("gemma", OWN),
    ("gemma2", GAINS),
    ("gemma2-v4", OWN),
    ("gemma3_text-v4", GAINS),
    ("olmo2-bias", GAINS),
    ("olmo2", OWN),
    ("qwen3", BASES),
    ("llama", NO_ATTENTION),
)


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max() / other.detach().abs().max())


def stored_with_gains(folder: Path, destination: Path) -> Path:
    """Writes the model of a folder again, with gains drawn between 0.5 and 1.5."""
    model, generator = load_model(folder, device="cpu"), torch.Generator().manual_seed(3)
    gains = [each for name, each in model.named_parameters() if ".gain." in name]
    assert gains
    for gain in gains:
        gain.data.uniform_(0.5, 1.5, generator=generator)
    model.save_pretrained(destination)
    for file in folder.iterdir():
        if not (destination / file.name).exists() and file.name != "manifest.json":
            (destination / file.name).write_bytes(file.read_bytes())
    return destination


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "gemma2", "olmo2"])
@torch.no_grad()
def test_new_gains_change_no_bit(load, tokens, variant):
    plain = {"fold": {"loops": 2}, "relax": {"rank": 3}}
    assert torch.equal(load(variant, GAINS)(tokens).logits, load(variant, plain)(tokens).logits)


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "olmo2"])
@torch.no_grad()
def test_a_gain_scales_the_update_of_its_part_alone(load, tokens, variant):
    model = load(variant, GAINS)
    seen: dict[str, Tensor] = {}
    for pool, part in (("mixer", model.model.mixers[0]), ("mlp", model.model.mlps[0])):

        def look(module: Any, given: Any, output: Any, pool: str = pool) -> None:
            # A mixer returns its update and the keys and values it made.
            seen.setdefault(pool, output[0] if isinstance(output, tuple) else output)

        part.register_forward_hook(look)
    depth = model.model.depths[0]
    before = model.model.embed_tokens(tokens)
    for pool, value in (("mixer", 0.25), ("mlp", -2.0)):
        depth.gain[pool].weight.fill_(value)
    after = model.model.run(range(1), before, model.model.batch(before)).hidden_states
    expected = before + 0.25 * seen["mixer"] - 2.0 * seen["mlp"]
    torch.testing.assert_close(after, expected)
    mixed = model.model.mix(0, before, model.model.batch(before)).hidden_states
    torch.testing.assert_close(mixed, 0.25 * seen["mixer"])
    for gain in depth.gain.values():
        gain.reset()
    assert [gain.weight.item() for gain in depth.gain.values()] == [1.0, 1.0]


@pytest.mark.parametrize(("variant", "recipe"), CASES, ids=[f"{name}-{at}" for at, (name, _) in enumerate(CASES)])
@torch.no_grad()
def test_the_dense_export_equals_the_native_model(fold, tokens, tmp_path, variant, recipe):
    folder = stored_with_gains(fold(variant, recipe), tmp_path / "gains")
    ours = load_model(folder, device="cpu")(tokens).logits
    dense = AutoModelForCausalLM.from_pretrained(export(folder, tmp_path / "dense")).eval()
    assert far(dense(tokens).logits, ours) < 2e-5
    # The control: without its gains the model is another one.
    assert far(load_model(fold(variant, recipe), device="cpu")(tokens).logits, ours) > 2e-3


@torch.no_grad()
def test_control_merged_into_the_output_projection_before_a_norm_gains_are_lost(fold, tokens, tmp_path, monkeypatch):
    from refold.blueprint.owned.gain import ResidualGain

    monkeypatch.setattr(ResidualGain, "_owner", lambda self, arch, pool: "o_proj" if pool == "mixer" else "down_proj")
    folder = stored_with_gains(fold("olmo2", GAINS), tmp_path / "gains")
    dense = AutoModelForCausalLM.from_pretrained(export(folder, tmp_path / "dense")).eval()
    assert far(dense(tokens).logits, load_model(folder, device="cpu")(tokens).logits) > 2e-3


def test_gains_train_as_a_group_without_decay(load, fold):
    model, folder = load("llama", GAINS), fold("llama", GAINS)
    groups = WeightGroups(model, folder)
    gains = groups.find("gains", "train")
    assert gains == {f"model.depths.{index}.gain.{pool}.weight" for index in range(4) for pool in ("mixer", "mlp")}
    assert gains < groups.find("adapters", "train")
    assert gains == groups.find("fresh", "train")
    stage = HealStage(tokens=1, train=("gains",), weight_decay=0.1)
    trainable = Trainable(stage, groups)
    assert trainable.trained == gains
    (optimizer,) = make_optimizers(model, stage, trainable)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]
    model(torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    assert all(model.get_parameter(name).grad.abs() > 0 for name in gains)


def test_folders_from_before_gains_load_without_them():
    arch = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    arch |= {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 8, "layers": [{}], "norm": {}}
    arch |= {"family": "llama", "activation": "silu", "attention_scale": 1.0}
    depth = {"source": 0, "mixer": 0, "mlp": 0}
    stack = {"arch": arch, "mixers": [{"sources": [0]}], "mlps": [{"sources": [0]}], "depths": [depth]}
    assert Blueprint.model_validate(stack).depths[0].gain == "tied"
