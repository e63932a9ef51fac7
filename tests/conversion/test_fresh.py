import pytest
import torch

from refold.blueprint.tensors import Role, TargetTensor
from refold.conversion.target_tensors import fresh_tensor, tensor_seed
from refold.families.arch import ArchSpec, Norm
from refold.families.registry import read_arch


def arch(**norm: float) -> ArchSpec:
    config = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    made = read_arch({"model_type": "llama", "num_hidden_layers": 2, "initializer_range": 0.07, **config})
    return made.model_copy(update={"norm": Norm.model_validate(norm)})


def linear(name: str, rows: int = 400, columns: int = 100, role: Role = "linear") -> TargetTensor:
    return TargetTensor(name, (rows, columns), role, "mixer", part=0, local="q_proj.weight")


def test_matrices_are_normal_with_the_sources_deviation():
    drawn = fresh_tensor(linear("w"), arch(), seed=0)
    assert drawn.std().item() == pytest.approx(0.07, rel=0.02)
    assert drawn.mean().abs() < 0.002


def test_loras_begin_with_gaussian_a_and_zero_b():
    a = fresh_tensor(linear("a", role="lora_a"), arch(), seed=0)
    assert a.std().item() == pytest.approx(0.1, rel=0.02)
    assert not fresh_tensor(linear("b", role="lora_b"), arch(), seed=0).any()


@pytest.mark.parametrize(("local", "offset", "value"), [("input_norm.weight", 0, 1), ("input_norm.weight", 1, 0)])
def test_norms_begin_at_scale_one_and_biases_at_zero(local, offset, value):
    tensor = TargetTensor("v", (8,), "vector", "mixer", part=0, local=local)
    assert torch.equal(fresh_tensor(tensor, arch(offset=offset), 0), torch.full((8,), float(value)))
    bias = TargetTensor("v", (8,), "vector", "mixer", part=0, local="q_proj.bias")
    assert not fresh_tensor(bias, arch(offset=offset), 0).any()


def test_each_tensor_has_values_of_its_own_that_the_seed_repeats():
    one, other = fresh_tensor(linear("one"), arch(), 0), fresh_tensor(linear("other"), arch(), 0)
    assert not torch.equal(one, other)
    assert torch.equal(one, fresh_tensor(linear("one"), arch(), 0))
    assert not torch.equal(one, fresh_tensor(linear("one"), arch(), 1))
    assert len({tensor_seed(seed, name) for seed in range(3) for name in ("a", "b")}) == 6


@pytest.mark.parametrize("local", ["lora.lm_head.b", "gate.weight", "gate.bias"])
def test_what_must_change_nothing_at_an_exit_begins_at_zero(local):
    assert not fresh_tensor(TargetTensor("e", (7, 3), "exit", depth=0, local=local), arch(), 0).any()


def test_exits_begin_with_a_gaussian_a_and_a_neutral_norm():
    a = fresh_tensor(TargetTensor("a", (400, 100), "exit", depth=0, local="lora.lm_head.a"), arch(), 0)
    assert a.std().item() == pytest.approx(0.1, rel=0.02)
    for offset in (0, 1):
        norm = TargetTensor("n", (8,), "exit", depth=0, local="norm.weight")
        assert torch.equal(fresh_tensor(norm, arch(offset=offset), 0), torch.full((8,), 1.0 - offset))
    assert not fresh_tensor(TargetTensor("n", (8,), "exit", depth=0, local="norm.bias"), arch(), 0).any()
