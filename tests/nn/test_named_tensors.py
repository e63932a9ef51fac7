"""Parameters under names with dots behave as those of modules below would, without being found as modules."""

import copy

import pytest
import torch
from torch import nn

from refold.nn.named_tensors import NamedTensors

NAMES = ["lora.q_proj.a", "lora.q_proj.b", "lora.A_log"]


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora = NamedTensors(
            {"q_proj.a": torch.randn(2, 3), "q_proj.b": torch.randn(3, 2), "A_log": torch.randn(4)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = dict(self.lora.named_parameters())
        return x @ held["q_proj.b"] @ held["q_proj.a"]


def test_names_have_dots_and_no_module_is_called_so() -> None:
    owner = Owner()
    assert [name for name, _ in owner.named_parameters()] == list(owner.state_dict()) == NAMES
    assert [name for name, _ in owner.named_modules()] == ["", "lora"]


def test_control_a_module_dictionary_is_found_by_the_name_of_the_linear() -> None:
    assert "q_proj" in dict(nn.ModuleDict({"q_proj": nn.Linear(1, 1)}).named_modules())


def test_a_tensor_is_found_and_replaced_by_its_path() -> None:
    owner = Owner()
    assert owner.get_parameter("lora.q_proj.a") is owner.lora["q_proj"].a is owner.lora._parameters["q_proj.a"]
    owner.get_submodule("lora.q_proj").a = nn.Parameter(torch.zeros(2, 3))
    assert not owner.state_dict()["lora.q_proj.a"].any()
    assert "q_proj" in owner.lora
    assert "k_proj" not in owner.lora
    with pytest.raises(AttributeError, match="k_proj"):
        owner.get_submodule("lora.k_proj")


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_loaded_strictly(assign: bool) -> None:
    one, other = Owner(), Owner()
    other.load_state_dict(one.state_dict(), assign=assign)
    assert all(torch.equal(value, one.state_dict()[name]) for name, value in other.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key.*lora.q_proj.a"):
        other.load_state_dict({name: one.state_dict()[name] for name in NAMES[1:]})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lora.k_proj.a"):
        other.load_state_dict({**one.state_dict(), "lora.k_proj.a": torch.zeros(1)})


def test_copies_casts_and_functional_calls_reach_the_tensors() -> None:
    owner, x = Owner(), torch.randn(2, 3)
    twin = copy.deepcopy(owner).double()
    assert {weight.dtype for weight in twin.parameters()} == {torch.float64}
    assert {weight.dtype for weight in owner.parameters()} == {torch.float32}
    zeros = {name: torch.zeros_like(value) for name, value in owner.state_dict().items()}
    assert not torch.func.functional_call(owner, zeros, (x,)).any()
    assert owner(x).any()
