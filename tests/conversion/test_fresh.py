import pytest
import torch

from refold.blueprint.schema import Blueprint
from refold.blueprint.tensors import target_tensors
from refold.conversion.target_tensors import fresh_tensor, tensor_seed
from refold.families.arch import Norm
from refold.families.registry import read_arch
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe

RECIPE = {
    "fold": {"loops": 2},
    "relax": {"rank": 4, "vectors": "own"},
    "exits": {"norm": "own", "head_rank": 3, "gate": True},
}


def build(**norm: float) -> Blueprint:
    config = {"vocab_size": 96, "hidden_size": 256, "intermediate_size": 48, "num_attention_heads": 4}
    arch = read_arch(
        {"model_type": "llama", "num_hidden_layers": 4, "initializer_range": 0.07, "attention_bias": True, **config}
    )
    arch = arch.model_copy(update={"norm": Norm.model_validate(norm)})
    return build_blueprint(arch, load_recipe(RECIPE)).blueprint


def fresh(name: str, blueprint: Blueprint, seed: int = 0) -> torch.Tensor:
    tensor = next(each for each in target_tensors(blueprint) if each.name == f"model.{name}")
    made = fresh_tensor(tensor, tensor.fill(blueprint), seed)
    assert made.dtype == torch.float32
    assert made.shape == tensor.shape
    return made


@pytest.mark.parametrize("name", ["mixers.0.q_proj.weight", "embed_tokens.weight", "mlps.1.down_proj.weight"])
def test_matrices_are_normal_with_the_sources_deviation(name):
    drawn = fresh(name, build())
    assert drawn.std().item() == pytest.approx(0.07, rel=0.03)
    assert drawn.mean().abs() < 0.002


@pytest.mark.parametrize("pair", ["depths.0.lora.q_proj", "exits.1.lora.lm_head"])
def test_loras_begin_with_gaussian_a_and_zero_b(pair):
    a = fresh(f"{pair}.a", build())
    assert a.std().item() == pytest.approx(256**-0.5, rel=0.1)
    assert not fresh(f"{pair}.b", build()).any()


@pytest.mark.parametrize(("offset", "value"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("norm", ["depths.0.vectors.mixer.input_norm.weight", "exits.1.norm.weight", "norm.weight"])
def test_norms_begin_at_scale_one(norm, offset, value):
    assert torch.equal(fresh(norm, build(offset=offset)), torch.full((256,), float(value)))


@pytest.mark.parametrize(
    "name", ["depths.0.vectors.mixer.q_proj.bias", "exits.1.gate.weight", "exits.1.gate.bias", "exits.1.norm.bias"]
)
def test_biases_and_gates_begin_at_zero(name):
    assert not fresh(name, build(offset=1, bias=True)).any()


def test_each_tensor_has_values_of_its_own_that_the_seed_repeats():
    blueprint = build()
    one, other = (fresh(f"depths.{depth}.lora.q_proj.a", blueprint) for depth in (0, 1))
    assert not torch.equal(one, other)
    assert torch.equal(one, fresh("depths.0.lora.q_proj.a", blueprint))
    assert not torch.equal(one, fresh("depths.0.lora.q_proj.a", blueprint, 1))
    assert len({tensor_seed(seed, name) for seed in range(3) for name in ("a", "b")}) == 6
