"""Models made from a config alone: every tensor is initialised by its module."""

from collections.abc import Iterator
from typing import cast

import pytest
import torch
from torch import Tensor

from refold.families.registry import read_arch
from refold.modeling.configuration import RefoldConfig
from refold.modeling.depth import Depth
from refold.modeling.model import RefoldForCausalLM
from refold.modeling.owned_tensors import Gain
from refold.nn.exits import Gate
from refold.nn.lora import Coefficients, LoraPairs
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe

CONFIG = {
    "vocab_size": 24,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "initializer_range": 0.3,
}
FULL = {
    "fold": {"loops": 2},
    "relax": {"rank": 4, "vectors": "own", "gain": "own"},
    "factor": {"parameters": 0.8, "share": "basis"},
    "exits": {"norm": "own", "head_rank": 2, "gate": True},
}
PREFIXED = {"fold": {"loops": 2}, "relax": {"type": "prefix", "length": 3}}
MIXERS = {"fold": {"loops": 2}, "mixers": [{"type": "gated_deltanet", "except": [0]}]}
KINDS = ({"model_type": "llama", "attention_bias": True}, {"model_type": "gemma2"}, {"model_type": "gpt_neox"})


@pytest.fixture
def _memory_is_nan() -> Iterator[None]:
    """Fills memory that is allocated without a value with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(recipe: dict, kind: dict) -> RefoldForCausalLM:
    blueprint = build_blueprint(read_arch({**CONFIG, **kind}), load_recipe(recipe)).blueprint
    return RefoldForCausalLM(RefoldConfig(blueprint=blueprint.model_dump(mode="json")))


def uninitialised(model: RefoldForCausalLM) -> list[str]:
    return [name for name, value in model.state_dict().items() if not value.isfinite().all()]


@pytest.mark.usefixtures("_memory_is_nan")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["model_type"])
@pytest.mark.parametrize("recipe", [FULL, PREFIXED, MIXERS], ids=["full", "prefixed", "mixers"])
def test_every_tensor_is_initialised(recipe, kind):
    assert uninitialised(make(recipe, kind)) == []


@pytest.mark.usefixtures("_memory_is_nan")
def test_control_without_a_reset_coefficients_are_not_initialised(monkeypatch):
    monkeypatch.setattr(Coefficients, "reset", lambda self: None)
    assert all(".coefficients." in name for name in uninitialised(make(FULL, KINDS[0])))
    assert uninitialised(make(FULL, KINDS[0]))


def test_relaxations_have_no_effect_at_first_and_matrices_are_gaussian():
    model = make(FULL, KINDS[1])
    for module in model.modules():
        for a, b in module().values() if isinstance(module, LoraPairs) else ():
            assert a.std() > 0
            assert not b.any()
        if isinstance(module, Gate):
            assert not module.weight.any()
            assert not module.bias.any()
    depth = cast(Depth, model.model.depths[0])
    assert depth.coefficients["q_proj"].std().item() == pytest.approx(0.3, rel=0.1)
    assert [cast(Gain, gain).weight.item() for gain in depth.gain.values()] == [1.0, 1.0]
    assert not cast(Tensor, model.model.norm.weight).any()  # Gemma adds one
    prefix = cast(Depth, make(PREFIXED, KINDS[1]).model.depths[0]).prefix
    assert prefix is not None
    assert prefix.std().item() == pytest.approx(0.3, rel=0.2)
