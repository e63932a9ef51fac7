"""accelerate's offloading moves weights where a module is called: every tensor must be read in such a call."""

from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

from refold.modeling.adapters import load_adapters

FOLD = {"loops": 2, "init": "average"}
RECIPES: dict[str, dict[str, Any]] = {
    "strict": {"fold": FOLD},
    "relaxed": {"fold": FOLD, "relax": {"rank": 3}},
    "own vectors": {"fold": FOLD, "relax": {"rank": 3, "vectors": "own"}},
    "joint": {"fold": FOLD, "relax": {"rank": 3, "init": "joint"}},
    "low rank": {"factor": {"parameters": 0.6, "weight": "none"}},
    "basis": {"fold": FOLD, "factor": {"parameters": 0.6, "share": "basis", "weight": "none"}},
    "prefix": {"fold": FOLD, "relax": {"type": "prefix", "length": 3}},
    "exits": {"fold": FOLD, "exits": {"at": [1, 2], "norm": "own", "head_rank": 2, "gate": True}},
    "gains": {"fold": FOLD, "relax": {"rank": 3, "vectors": "own", "gain": "own"}},
    "mamba": {"mixers": [{"type": "mamba", "transfer": ["mlp"]}]},
    "mamba2 of own vectors": {"fold": FOLD, "mixers": [{"type": "mamba2"}], "relax": {"rank": 2, "vectors": "own"}},
    "mamba of own vectors": {
        "fold": FOLD,
        "mixers": [{"type": "mamba", "transfer": ["mlp"]}],
        "relax": {"rank": 2, "vectors": "own"},
    },
    "gated_deltanet": {"mixers": [{"type": "gated_deltanet"}]},
    "features": {"mixers": [{"type": "linear_attention", "window": 4}]},
}


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_an_offloaded_model_gives_the_same_bits(load, tokens, name):
    model = load("llama", RECIPES[name])
    exits = name == "exits"
    expected = model(tokens, output_exits=exits)
    early = model(tokens, exit_depth=2).logits
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generated = model.generate(tokens, **options)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.parameters())
    found = model(tokens, output_exits=exits)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(model(tokens, exit_depth=2).logits, early)
    for one, other in zip(
        (*(found.exit_logits or ()), *(found.exit_gates or ())),
        (*(expected.exit_logits or ()), *(expected.exit_gates or ())),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert torch.equal(model.generate(tokens, **options), generated)


@pytest.mark.parametrize("name", ["relaxed", "own vectors", "joint", "low rank", "basis", "prefix"])
@torch.no_grad()
def test_a_model_dispatched_to_disk_gives_the_same_logits(load, tokens, tmp_path, name):
    model = load("llama", RECIPES[name])
    expected = model(tokens).logits
    places: dict[str, str | int | torch.device] = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "lm_head": "disk",
        "model.mlps": "disk",
    }
    places |= {"model.exits": "cpu", "model.rotaries": "cpu", "model.mixers": "cpu", "model.depths": "disk"}
    model = dispatch_model(model, places, main_device=torch.device("cpu"), offload_dir=str(tmp_path), force_hooks=True)
    assert any(weight.is_meta for name, weight in model.named_parameters() if "mlps" in name)
    found = model(tokens).logits
    # Mapped files are aligned otherwise than memory, which kernels may round by.
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6


def test_reading_a_tensor_outside_a_call_is_what_fails(load):
    model = load("llama", RECIPES["relaxed"])
    cpu_offload(model, execution_device=torch.device("cpu"))
    pairs = model.model.depths[0].lora
    assert pairs["q_proj"].a.is_meta
    assert not any(factor.is_meta for pair in pairs().values() for factor in pair)


def test_adapters_of_another_folder_are_not_lost(load, fold):
    model = load("llama", RECIPES["relaxed"])
    assert load_adapters(model, fold("llama", RECIPES["relaxed"])) == sum(
        ".lora." in name for name, _ in model.named_parameters()
    )
