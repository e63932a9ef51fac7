"""books-12l, the base of the healing study: facts of its card, and agreement of refold on a trained OLMo 2."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Olmo2ForCausalLM

import refold
from refold.recipe.load import load_recipe

FOLDER = Path(__file__).parents[2] / "benchmarks" / "books-12l"
PASSAGE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing "
    "before us, we were all going direct to Heaven, we were all going direct the other way."
)


@pytest.fixture(scope="module")
def model() -> Olmo2ForCausalLM:
    return Olmo2ForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    return torch.tensor([[0, *tokenizer(PASSAGE, add_special_tokens=False)["input_ids"]]])


def test_it_has_the_promised_shape(model: Olmo2ForCausalLM) -> None:
    assert model.config.num_hidden_layers == 12
    assert 3_000_000 < sum(p.numel() for p in model.parameters()) < 5_000_000
    assert (FOLDER / "model.safetensors").stat().st_size < 7_000_000


def test_it_predicts_english(model: Olmo2ForCausalLM, ids: torch.Tensor) -> None:
    with torch.no_grad():
        nats = model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
        scrambled = model(input_ids=ids.flip(1), labels=ids.flip(1)).loss * (ids.shape[1] - 1)
    assert nats / math.log(2) / len(PASSAGE) < 1.9
    assert scrambled > 1.5 * nats


def test_recipes_log_and_card_tell_the_same(model: Olmo2ForCausalLM) -> None:
    tokens = sum(stage.tokens for name in ("stable", "fall") for stage in load_recipe(FOLDER / f"{name}.yaml").heal)
    log = [json.loads(line) for line in (FOLDER / "training.jsonl").read_text().splitlines()]
    assert log[-1]["tokens"] == tokens
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
    assert f"{tokens / 1e6:.1f} million tokens" in card
    held_out = [line["held_out"] for line in log if "held_out" in line]
    stated = re.search(r"followed while training \| (\d\.\d+) bits per byte", card)
    assert stated is not None
    assert float(stated[1]) == pytest.approx(held_out[-1], abs=0.0006)


def test_the_identity_gives_a_trained_olmo2s_logits(model: Olmo2ForCausalLM, ids: torch.Tensor, tmp_path: Path) -> None:
    refold.convert(FOLDER, tmp_path / "same", options=refold.ConvertOptions(allow_larger=True))
    same = refold.load_model(tmp_path / "same", dtype="float32", device="cpu")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = same(input_ids=ids).logits
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
