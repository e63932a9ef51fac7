"""Conversion of stacks with shared keys and values, and the plan lines of unused tensors."""

import pytest
import torch

from refold.checkpoint.reader import CheckpointReader
from refold.conversion.convert import ConvertOptions, convert
from refold.planning.plan import plan

FIRST = {"fold": {"loops": 2, "init": "average"}, "share_kv": {"from": "first_loop"}}


@pytest.mark.parametrize("recipe", [FIRST, {"share_kv": {"from": "pairs"}}], ids=["tied", "untied"])
def test_the_plan_says_why_a_layers_key_weights_are_not_used(make_source, recipe):
    made = plan(make_source("llama-mha-bias"), recipe)
    dropped = {
        line.tensors: line for line in made.lines if line.reason == "keys and values are read from another depth"
    }
    layers = {line.layers for line in dropped.values()}
    names = {
        f"model.layers.*.self_attn.{name}" for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias")
    }
    assert dropped.keys() == names
    assert layers == ({(2, 3)} if "fold" in recipe else {(1, 3)})
    assert made.needs_healing


@pytest.mark.parametrize("rank", [0, 3])
def test_a_tied_parts_keys_are_those_of_the_layer_that_makes_them(make_source, tmp_path, rank):
    source = make_source("llama-mha-bias")
    convert(
        source,
        tmp_path / "out",
        {**FIRST, "relax": {"rank": rank, "init": "svd"}},
        options=ConvertOptions(allow_larger=True),
    )
    with CheckpointReader(source) as theirs, CheckpointReader(tmp_path / "out") as ours:
        for name in ("k_proj.weight", "v_proj.weight", "v_proj.bias"):
            found = ours.read(f"model.mixers.1.{name}")
            assert torch.equal(found, theirs.read(f"model.layers.1.self_attn.{name}"))
        query = torch.stack([theirs.read(f"model.layers.{layer}.self_attn.q_proj.weight") for layer in (1, 3)])
        torch.testing.assert_close(ours.read("model.mixers.1.q_proj.weight"), query.mean(0))
        assert ("model.depths.1.lora.k_proj.a" in ours.names()) == (rank > 0)
        assert "model.depths.3.lora.k_proj.a" not in ours.names()
