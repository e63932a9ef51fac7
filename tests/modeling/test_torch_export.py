"""Graphs of `torch.export` serve any number of rows and tokens, for every mixer, with and without gradients."""

import json
import subprocess
import sys
from typing import Any

import pytest

# In a process of its own: checked annotations cannot be traced.
SCRIPT = """
import json, sys
import torch
import refold
from refold.families.registry import read_arch
from refold.modeling.configuration import RefoldConfig
from refold.modeling.model import RefoldForCausalLM
from refold.planning.build import build_blueprint
from refold.recipe.recipe import Recipe

recipes, wants_mask, wants_gradients = json.loads(sys.argv[1]), sys.argv[2] == "padded", sys.argv[3] == "gradients"
arch = read_arch({"model_type": "llama", "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4})


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def draw(rows, length):
    tokens = torch.randint(0, 48, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(tokens)
    mask[0, : length // 4] = 0
    return (tokens, mask) if wants_mask else (tokens,)


def gradients(logits, module):
    module.zero_grad()
    logits.square().mean().backward()
    return {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}


def compare(given, expected):
    assert expected
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        worst = (given[name] - value).abs().max() / value.abs().max().clamp(min=1e-6)  # a gradient of zero is noise
        assert worst < 5e-5, (name, worst)


torch.set_grad_enabled(wants_gradients)
for recipe in recipes:
    # torch compiles the scan of recurrent mixers once for each process, with the sizes of the first model.
    torch._dynamo.reset()
    torch.manual_seed(0)
    blueprint = build_blueprint(arch, Recipe.model_validate(recipe)).blueprint
    config = RefoldConfig(blueprint=blueprint.model_dump(mode="json"), initializer_range=0.3)
    plain = Logits(RefoldForCausalLM(config).eval())
    for name, weight in plain.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(weight, std=0.3)  # LoRAs of a new model add nothing
    given = draw(2, 9)
    if any(depth.prefix for depth in blueprint.depths):
        # torch cannot prove that strides of prefix and tokens are those of a plain tensor, so it must check them.
        sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    else:
        sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=4096)}
    traced = torch.export.export(plain, given, dynamic_shapes=[sizes for _ in given]).module()
    for rows, length in ((2, 9), (1, 2), (3, 5), (4, 70)):
        given = draw(rows, length)
        found, expected = traced(*given), plain(*given)
        compare({"logits": found.detach()}, {"logits": expected.detach()})
        if wants_gradients:
            compare(gradients(found, traced), gradients(expected, plain))
    print("done", flush=True)
"""
MIXERS: dict[str, dict[str, Any]] = {
    "retention": {"type": "retention"},
    "gated delta": {"type": "gated_deltanet"},
    "gla": {"type": "gla"},
    "mamba": {"type": "mamba", "transfer": ["mlp"]},
    "mamba2": {"type": "mamba2", "transfer": ["mlp"]},
    "linear attention": {"type": "linear_attention"},
    "linear attention with a window": {"type": "linear_attention", "window": 4},
}
HYBRIDS = [{"mixers": [{"depths": [1], **mixer}]} for mixer in MIXERS.values()]
STACKS: dict[str, dict[str, Any]] = {
    "attention": {},
    "relaxed": {"fold": {"loops": 2}, "relax": {"rank": 2}},
    "prefixes": {"fold": {"loops": 2}, "relax": {"type": "prefix", "length": 3}},
    "dropped": {"drop": {"attention": {"layers": [1]}, "mlp": {"layers": [2]}}},
    "shared keys": {"share_kv": {"from": "pairs"}},
}


def run(recipes: list[dict[str, Any]], rows: str, gradients: str) -> None:
    command = [sys.executable, "-c", SCRIPT, json.dumps(recipes), rows, gradients]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done") == len(recipes)


# Slow; the ONNX contract runs graphs of every mixer too.
@pytest.mark.long
@pytest.mark.timeout(600)
def test_graphs_of_all_mixers_serve_other_sizes() -> None:
    run(HYBRIDS, "whole", "inference")


@pytest.mark.timeout(600)
def test_graphs_of_attention_stacks_serve_other_sizes_with_gradients() -> None:
    run(list(STACKS.values()), "whole", "gradients")


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("gradients", ["inference", "gradients"])
@pytest.mark.parametrize("rows", ["whole", "padded"])
def test_every_stack_serves_other_sizes(rows: str, gradients: str) -> None:
    run([*HYBRIDS, *STACKS.values()], rows, gradients)
