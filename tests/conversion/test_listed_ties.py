"""Folds of listed ties, against transformers' model with the same weights averaged, and back to the source."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import refold
from refold.data.readers import from_documents

IDS = torch.randint(3, 290, (2, 24), generator=torch.Generator().manual_seed(3))
GROUPS = [{"layers": [0, 2], "tie": ["mixer"]}, {"layers": [1, 2, 3], "tie": ["mlp"]}]
TEXT = from_documents(
    [f"Chapter {number}: the sea was calm, and {number * 7} ships lay on it." for number in range(60)]
)


@torch.no_grad()
def logits_of(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@torch.no_grad()
def test_averaged_groups_are_transformers_layers_with_mean_weights(make_model, tmp_path: Path) -> None:
    source = make_model("mistral-window")
    refold.convert(source, tmp_path / "fold", {"fold": {"groups": GROUPS, "init": "average"}})
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    whole = model(IDS).logits
    layers = model.model.layers
    for modules in (
        [layers[layer].self_attn for layer in (0, 2)],
        [layers[layer].input_layernorm for layer in (0, 2)],
        [layers[layer].mlp for layer in (1, 2, 3)],
        [layers[layer].post_attention_layernorm for layer in (1, 2, 3)],
    ):
        for parameters in zip(*(module.parameters() for module in modules), strict=True):
            mean = torch.stack(list(parameters)).mean(dim=0)
            for parameter in parameters:
                parameter.copy_(mean)
    found = logits_of(tmp_path / "fold")
    assert torch.allclose(found, model(IDS).logits, atol=2e-4)
    assert not torch.allclose(found, whole, atol=1e-2)


def test_full_ranks_give_the_source_back(make_model, tmp_path: Path) -> None:
    source = make_model("llama")
    recipe = {
        "calibration": {"tokens": 256, "context": 32},
        "fold": {"groups": GROUPS, "align": "permutation"},
        "relax": {"rank": "full", "init": "joint", "vectors": "own", "weight": "activations"},
    }
    options = refold.ConvertOptions(allow_larger=True)
    refold.convert(source, tmp_path / "fold", recipe, options=options, calibration=TEXT)
    assert torch.allclose(logits_of(tmp_path / "fold"), logits_of(source), atol=5e-3)
    strict = {**recipe, "relax": {**recipe["relax"], "rank": 2}}
    refold.convert(source, tmp_path / "small", strict, calibration=TEXT)
    assert not torch.allclose(logits_of(tmp_path / "small"), logits_of(source), atol=5e-2)


def test_listed_ties_are_exported_as_other_ties_are(make_model, tmp_path: Path) -> None:
    source = make_model("llama")
    refold.convert(source, tmp_path / "fold", {"fold": {"groups": GROUPS, "init": "average"}})
    refold.export(tmp_path / "fold", tmp_path / "dense", to="dense")
    assert torch.allclose(logits_of(tmp_path / "dense"), logits_of(tmp_path / "fold"), atol=2e-4)
