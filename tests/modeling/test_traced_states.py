"""Stacks with recurrent states compile into one graph."""

import subprocess
import sys

import pytest

# In a process of its own: checked annotations cannot be traced.
SCRIPT = """
import json, sys
import torch
import torch._dynamo
import refold
from transformers import StaticCache
from refold.families.registry import read_arch
from refold.modeling.configuration import RefoldConfig
from refold.modeling.model import RefoldForCausalLM
from refold.planning.build import build_blueprint
from refold.recipe.recipe import Recipe

mixers, wants_mask = json.loads(sys.argv[1]), sys.argv[2] == "padded"
torch._dynamo.config.fail_on_recompile_limit_hit = True
arch = read_arch({"model_type": "llama", "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2})
tokens = torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(tokens)
mask[0, :2] = 0


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def gradients(logits, module):
    module.zero_grad()
    logits.square().mean().backward()
    return {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}


def compare(given, expected):
    assert expected
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        worst = (given[name] - value).abs().max() / value.abs().max().clamp(min=1e-30)
        assert worst < 5e-5, (name, worst)


def check(given, expected, traced, plain):
    compare({"logits": given.detach()}, {"logits": expected.detach()})
    compare(gradients(given, traced), gradients(expected, plain))


def compile_whole(model):
    assert model._can_compile_fullgraph
    plain = Logits(model)
    traced = torch.compile(plain, fullgraph=True, backend="aot_eager")
    given = (tokens, mask) if wants_mask else (tokens,)
    check(traced(*given), plain(*given), plain, plain)
    decode = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected, cache = model(tokens).logits, StaticCache(config=model.config, max_cache_len=16)
        model(tokens[:, :7], past_key_values=cache, use_cache=True)
        for place in (7, 8):
            seen = {"position_ids": torch.full((2, 1), place), "attention_mask": torch.ones(2, place + 1)}
            found = decode(tokens[:, place : place + 1], past_key_values=cache, use_cache=True, **seen)
            compare({"logits": found.logits}, {"logits": expected[:, place : place + 1]})


for mixer in mixers:
    blueprint = build_blueprint(arch, Recipe.model_validate({"mixers": [{"depths": [1], **mixer}]})).blueprint
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = RefoldConfig(blueprint=blueprint.model_dump(mode="json"), initializer_range=0.3)
    compile_whole(RefoldForCausalLM(config).eval())
    print(mixer["type"], "done", flush=True)
"""
MIXERS = {
    "retention": '{"type": "retention"}',
    "gated delta": '{"type": "gated_deltanet"}',
    "gla": '{"type": "gla"}',
    "mamba": '{"type": "mamba", "transfer": ["mlp"]}',
    "mamba2": '{"type": "mamba2", "transfer": ["mlp"]}',
    "linear attention": '{"type": "linear_attention"}',
    "linear attention with a window": '{"type": "linear_attention", "window": 4}',
}


def trace(rows: str, *mixers: str) -> None:
    command = [sys.executable, "-c", SCRIPT, f"[{', '.join(mixers)}]", rows]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done") == len(mixers)


@pytest.mark.timeout(600)
def test_a_hybrid_traces_with_gradients() -> None:
    trace("whole", MIXERS["gated delta"])


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rows", ["whole", "padded"])
@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_every_recurrent_mixer_traces_with_gradients(mixer: str, rows: str) -> None:
    trace(rows, mixer)
