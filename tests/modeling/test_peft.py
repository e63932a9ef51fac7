"""PEFT adds adapters to the stored linears of every kind of fold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from refold import linear_names
from refold.errors import RefoldError
from refold.modeling.load import load_model

peft = pytest.importorskip("peft")

OWN = {"type": "lora", "rank": 3, "vectors": "own"}
WHOLE: dict[str, dict[str, Any]] = {
    "strict": {"fold": {"loops": 2}},
    "relaxed": {"fold": {"loops": 2}, "relax": OWN},
    "joint": {"fold": {"loops": 2}, "relax": {"rank": 3, "init": "joint"}},
    "exits": {"fold": {"loops": 2}, "relax": OWN, "exits": {"at": [1], "head_rank": 2}},
}
FACTORED: dict[str, dict[str, Any]] = {
    "low rank": {"factor": {"parameters": 0.67, "weight": "none"}},
    "basis": {"fold": {"loops": 2}, "factor": {"parameters": 0.5, "share": "basis", "weight": "none"}},
}
LINEARS = ["q_proj", "v_proj"]


def check(folder: Path, targets: Any, tokens: Tensor, scratch: Path) -> list[str]:
    """Trains, saves and loads adapters on a fold; returns the names of the modules that got some."""
    base = load_model(folder, device="cpu", dtype="float32")
    expected = base(tokens).logits
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, r=2))
    torch.testing.assert_close(model(tokens).logits, expected)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all(weight.grad is not None and weight.grad.any() for weight in trained.values())
    healed = model.eval()(tokens).logits
    assert (healed - expected).abs().max() > 1e-4
    model.save_pretrained(scratch)
    again = peft.PeftModel.from_pretrained(load_model(folder, device="cpu", dtype="float32"), scratch).eval()
    assert torch.equal(again(tokens).logits, healed)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, healed, rtol=1e-3, atol=1e-4)
    return [name.partition(".lora_A")[0].removeprefix("base_model.model.") for name in trained if "lora_A" in name]


@pytest.mark.parametrize("recipe", WHOLE.values(), ids=WHOLE)
def test_names_of_linears_find_the_stored_linears_alone(
    fold: Callable[..., Path], tokens: Tensor, recipe: dict[str, Any], tmp_path: Path
) -> None:
    folder = fold("llama", recipe)
    found = check(folder, LINEARS, tokens, tmp_path)
    assert found
    assert all(name.startswith("model.mixers.") for name in found)
    assert sorted(found) == sorted(linear_names(load_model(folder, device="cpu"), LINEARS))


@pytest.mark.parametrize("recipe", [*WHOLE.values(), *FACTORED.values()], ids=[*WHOLE, *FACTORED])
def test_linear_names_fit_every_fold(
    fold: Callable[..., Path], tokens: Tensor, recipe: dict[str, Any], tmp_path: Path
) -> None:
    folder = fold("llama", recipe)
    names = linear_names(load_model(folder, device="cpu"), LINEARS)
    assert sorted(check(folder, names, tokens, tmp_path)) == sorted(names)


def test_a_head_with_exits_is_adapted_once(fold: Callable[..., Path], tokens: Tensor, tmp_path: Path) -> None:
    assert check(fold("llama", WHOLE["exits"]), ["lm_head"], tokens, tmp_path) == ["lm_head"]


def test_a_name_that_is_no_linear_is_refused(fold: Callable[..., Path]) -> None:
    model = load_model(fold("llama", WHOLE["strict"]), device="cpu")
    with pytest.raises(RefoldError, match=r"linears: names of stored linears are required \(got 'q_prj'.*q_proj"):
        linear_names(model, ["q_prj"])
