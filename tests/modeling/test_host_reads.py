"""A decoding step asks the device for nothing: each question would wait for all that was launched."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

RECIPES: dict[str, dict[str, Any]] = {
    "attention": {"fold": {"loops": 2}, "relax": {"rank": 2, "vectors": "own"}},
    "recurrent": {"mixers": [{"type": "gated_deltanet"}]},
    "hybrid": {"mixers": [{"type": "retention", "except": [1]}]},
    "prefix": {"fold": {"loops": 2}, "relax": {"type": "prefix", "length": 3}},
}


class NoHostReads(TorchDispatchMode):
    """Refuses every operation that brings a tensor's content to Python."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.READS:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def test_the_mode_sees_reads():
    with NoHostReads():
        for read in (bool, lambda x: x.item(), lambda x: x.nonzero()):
            with pytest.raises(AssertionError, match="waits for the device"):
                read(torch.ones(1))


def prompt(tokens: torch.Tensor, kind: str) -> dict[str, Any]:
    """A padded or a packed prompt, or a plain one."""
    mask, positions = torch.ones_like(tokens), torch.arange(tokens.shape[1]).expand_as(tokens)
    if kind == "padded":
        mask[0, :5] = 0
    if kind == "packed":
        positions = torch.cat((torch.arange(9), torch.arange(tokens.shape[1] - 9))).expand_as(tokens)
    return {"attention_mask": mask, **({} if kind == "padded" else {"position_ids": positions})}


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_no_step_of_generation_reads_from_the_device(load, tokens, monkeypatch, name, kind):
    model = load("llama", RECIPES[name])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    given = prompt(tokens, kind)
    expected = model.generate(tokens, **given, **options)
    steps = []
    plain = model.model.forward

    def watched(**arguments: Any) -> Any:
        if arguments["input_ids"].shape[1] > 1:
            return plain(**arguments)
        steps.append(1)
        with NoHostReads():
            return plain(**arguments)

    monkeypatch.setattr(model.model, "forward", watched)
    assert torch.equal(model.generate(tokens, **given, **options), expected)
    assert len(steps) == 4


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_a_step_told_that_rows_are_one_document_reads_nothing(load, tokens, name):
    model = load("llama", RECIPES[name])
    cache = DynamicCache(config=model.config)
    model(tokens[:, :-1], past_key_values=cache)
    positions = torch.full((2, 1), tokens.shape[1] - 1)
    with pytest.raises(AssertionError, match="waits"), NoHostReads():
        model(tokens[:, -1:], position_ids=positions, past_key_values=DynamicCache(config=model.config))
    with NoHostReads():
        found = model(tokens[:, -1:], position_ids=positions, past_key_values=cache, is_packed=False).logits
    expected = model(tokens).logits[:, -1:]
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
