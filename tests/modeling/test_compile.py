"""Compiled models give the same outputs, and parts are not compiled again for every depth."""

import subprocess
import sys

import pytest

# In a process of its own: checked annotations cannot be traced.
SCRIPT = """
import functools, json, sys
import torch
import torch._dynamo
from torch._dynamo.utils import counters
import refold
from refold.planning.build import build_blueprint
from refold.recipe.recipe import Recipe
from refold.families.registry import read_arch
from refold.modeling.configuration import RefoldConfig
from refold.modeling.model import RefoldForCausalLM

torch._dynamo.config.fail_on_recompile_limit_hit = True
if sys.argv[2] != "inductor":
    torch.compile = functools.partial(torch.compile, backend=sys.argv[2])
arch = read_arch({"model_type": "llama", "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 20})
blueprint = build_blueprint(arch, Recipe.model_validate(json.loads(sys.argv[1]))).blueprint
torch.manual_seed(0)
model = RefoldForCausalLM(RefoldConfig(blueprint=blueprint.model_dump(mode="json"), initializer_range=0.3)).eval()
for name, weight in model.named_parameters():
    if name.endswith(".b") or ".exits." in name:
        torch.nn.init.normal_(weight, std=0.3)
tokens = torch.randint(0, 48, (2, 9))
with torch.no_grad():
    expected = model(tokens).logits
    if sys.argv[3] == "parts":
        model.compile_parts()
        compiled = model
    else:
        compiled = torch.compile(model, fullgraph=True)
    pairs = [(compiled(tokens).logits, expected)]
    if blueprint.depths[1].exit is not None and sys.argv[3] == "whole":
        whole, left = (each(tokens, output_exits=True) for each in (compiled, model))
        pairs += zip((*whole.exit_logits, *whole.exit_gates), (*left.exit_logits, *left.exit_gates))
        pairs.append((compiled(tokens, exit_depth=2).logits, left.exit_logits[0]))
    for given, expected in pairs:
        worst = (given - expected).abs().max() / expected.abs().max()
        assert worst < 2e-5, worst
    if sys.argv[3] == "parts":
        expected = model.generate(tokens, max_new_tokens=4, do_sample=False)
        for length in (5, 7, 8):
            model(tokens[:, :length])
print(counters["stats"]["unique_graphs"])
"""


def graphs(recipe: str, backend: str, what: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, recipe, backend, what], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


def test_depths_of_equal_ranks_share_the_code_of_their_part():
    tied = '{"fold": {"loops": 10}, "relax": {"rank": 2, "init": "zero", "vectors": "own"}}'
    # Two mixers (before and after the cache) and two MLPs, each for a length, for any length, and for one token.
    assert graphs(tied, "eager", "parts") <= 3 * 3 * 2


def test_twenty_untied_parts_stay_below_the_limit_of_recompilations():
    assert graphs("{}", "eager", "parts") <= 4 * 3


def test_the_whole_model_compiles_into_one_graph():
    assert graphs('{"fold": {"loops": 10}, "relax": {"rank": 2}}', "eager", "whole") == 1


def test_depths_that_read_keys_share_the_code_of_their_part():
    share = '{"fold": {"loops": 10}, "share_kv": {"from": "first_loop"}}'
    # Of two mixers before the cache with keys, without, and after it, and of two MLPs; each for three lengths.
    assert graphs(share, "eager", "parts") <= 3 * 4 * 2
    assert graphs(share, "eager", "whole") == 1


@pytest.mark.parametrize(("what", "most"), [("parts", 3 * 3 * 2), ("whole", 1)])
def test_depths_that_share_bases_share_the_code_of_their_part(what, most):
    shared = '{"fold": {"loops": 10}, "factor": {"parameters": 0.5, "share": "basis"}}'
    assert graphs(shared, "eager", what) <= most


def test_a_model_with_prefixes_compiles_into_one_graph():
    assert graphs('{"fold": {"loops": 10}, "relax": {"type": "prefix", "length": 3}}', "eager", "whole") == 1


@pytest.mark.long
def test_compiled_code_computes_the_same():
    assert graphs('{"fold": {"loops": 10}, "relax": {"rank": 2}}', "inductor", "parts") > 0


def test_a_model_left_at_exits_compiles_into_one_graph_for_each_way_out():
    exits = '{"fold": {"loops": 10}, "exits": {"at": [1, 3], "norm": "own", "head_rank": 2, "gate": true}}'
    assert graphs(exits, "eager", "whole") == 3
