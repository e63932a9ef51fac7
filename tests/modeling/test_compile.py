"""Compiled models give the same outputs, and parts are not compiled again for every depth."""

import json
import subprocess
import sys
from typing import Any

import pytest

# Imports and ten compiled depths take long on a busy machine.
pytestmark = pytest.mark.timeout(600)
# In a process of its own: checked annotations cannot be traced. One process for all cases: imports take longest.
SCRIPT = """
import json, sys
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
compile_any = torch.compile
arch = read_arch({"model_type": "llama", "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 10})

def count(recipe, backend, what):
    torch._dynamo.reset()
    counters.clear()
    torch.compile = lambda *given, **options: compile_any(*given, **{"backend": backend, **options})
    blueprint = build_blueprint(arch, Recipe.model_validate(recipe)).blueprint
    torch.manual_seed(0)
    model = RefoldForCausalLM(RefoldConfig(blueprint=blueprint.model_dump(mode="json"), initializer_range=0.3)).eval()
    for name, weight in model.named_parameters():
        if name.endswith(".b") or ".exits." in name:
            torch.nn.init.normal_(weight, std=0.3)
    tokens = torch.randint(0, 48, (2, 9))
    with torch.no_grad():
        expected = model(tokens).logits
        if what == "parts":
            model.compile_parts()
            compiled = model
        else:
            compiled = torch.compile(model, fullgraph=True)
        pairs = [(compiled(tokens).logits, expected)]
        if blueprint.depths[1].exit is not None and what == "whole":
            whole, left = (each(tokens, output_exits=True) for each in (compiled, model))
            pairs += zip((*whole.exit_logits, *whole.exit_gates), (*left.exit_logits, *left.exit_gates))
            pairs.append((compiled(tokens, exit_depth=2).logits, left.exit_logits[0]))
        for given, expected in pairs:
            worst = (given - expected).abs().max() / expected.abs().max()
            assert worst < 2e-5, worst
        if what == "parts":
            expected = model.generate(tokens, max_new_tokens=4, do_sample=False)
            for length in (5, 7, 8):
                model(tokens[:, :length])
    return counters["stats"]["unique_graphs"]

print(json.dumps([count(*case) for case in json.loads(sys.argv[1])]))
"""
FOLD = {"loops": 5}
RECIPES: dict[str, dict[str, Any]] = {
    "tied": {"fold": FOLD, "relax": {"rank": 2, "init": "zero", "vectors": "own"}},
    "untied": {},
    "relaxed": {"fold": FOLD, "relax": {"rank": 2}},
    "shared keys": {"fold": FOLD, "share_kv": {"from": "first_loop"}},
    "bases": {"fold": FOLD, "factor": {"parameters": 0.5, "share": "basis"}},
    "prefixes": {"fold": FOLD, "relax": {"type": "prefix", "length": 3}},
    "exits": {"fold": FOLD, "exits": {"at": [1, 3], "norm": "own", "head_rank": 2, "gate": True}},
}
MOST = {
    # Two mixers (before and after the cache) and two MLPs, each for a length, for any length, and for one token.
    ("tied", "parts"): 3 * 3 * 2,
    ("untied", "parts"): 4 * 3,
    # Of two mixers before the cache with keys, without, and after it, and of two MLPs; each for three lengths.
    ("shared keys", "parts"): 3 * 4 * 2,
    ("bases", "parts"): 3 * 3 * 2,
}
"""Most graphs of ten depths whose parts are compiled: depths share the code of equal parts."""
WHOLE = {"relaxed": 1, "shared keys": 1, "bases": 1, "prefixes": 1, "exits": 3}
"""Graphs of a whole model: one, and one more for each way out."""


def count_graphs(*cases: tuple[str, str, str]) -> list[int]:
    """Counts the graphs of cases (recipe, backend, `parts` or `whole`), and checks that all compute the same."""
    given = json.dumps([(RECIPES[name], backend, what) for name, backend, what in cases])
    done = subprocess.run([sys.executable, "-c", SCRIPT, given], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def graphs() -> dict[tuple[str, str], int]:
    """Numbers of graphs by recipe and `parts` or `whole`."""
    cases = [*MOST, *((name, "whole") for name in WHOLE)]
    return dict(zip(cases, count_graphs(*((name, "eager", what) for name, what in cases)), strict=True))


@pytest.mark.parametrize("case", MOST, ids=" ".join)
def test_depths_share_the_code_of_their_parts(graphs: dict[tuple[str, str], int], case: tuple[str, str]) -> None:
    assert 0 < graphs[case] <= MOST[case]


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_compiles_into_one_graph_for_each_way_out(graphs: dict[tuple[str, str], int], name: str) -> None:
    assert graphs[name, "whole"] == WHOLE[name]


@pytest.mark.long
def test_compiled_code_computes_the_same() -> None:
    assert count_graphs(("relaxed", "inductor", "parts"))[0] > 0
