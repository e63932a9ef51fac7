"""A resized vocabulary changes blueprint, head and head adapters, and the saved model loads again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from refold.analysis.analyse import analyse
from refold.conversion.convert import convert
from refold.data.readers import from_documents
from refold.errors import DataError, SourceError
from refold.evaluation.evaluate import evaluate
from refold.evaluation.settings import EvaluationSettings
from refold.generation.generate import generate
from refold.modeling.load import load_model
from refold.planning.plan import plan

EXITS = {"at": "loops", "head_rank": 3, "norm": "own"}
RECIPES: dict[str, dict[str, Any]] = {
    "strict": {"fold": {"loops": 2}},
    "relaxed": {"fold": {"loops": 2}, "relax": {"type": "lora", "rank": 4, "vectors": "own"}},
    "exits": {"fold": {"loops": 2}, "exits": EXITS},
    "states": {"mixers": [{"type": "retention", "depths": [1]}]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("size", [101, 90])
@torch.no_grad()
def test_a_resized_model_is_saved_and_loads_to_the_same_bits(
    load: Callable[..., Any], tokens: Tensor, tmp_path: Path, recipe: dict[str, Any], tied: bool, size: int
) -> None:
    model, ids = load("llama", recipe, tie_word_embeddings=tied), tokens.clamp(max=89)
    for depth in model.model.exit_depths:
        lora = model.model.exit_parts(depth).lora
        if lora is not None:
            lora.pair[1].normal_()
    before = model(ids, output_exits=True)
    model.resize_token_embeddings(size)
    after = model(ids, output_exits=True)
    kept = min(size, 96)
    torch.testing.assert_close(after.logits[..., :kept], before.logits[..., :kept])
    assert after.logits.shape[-1] == size
    for one, other in zip(after.exit_logits, before.exit_logits, strict=True):
        torch.testing.assert_close(one[..., :kept], other[..., :kept])
    model.save_pretrained(tmp_path)
    for again in (load_model(tmp_path, device="cpu"), AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert again.config.read_blueprint().arch.vocab_size == again.config.vocab_size == size
        found = again(ids, output_exits=True)
        assert torch.equal(found.logits, after.logits)
        assert all(torch.equal(*pair) for pair in zip(found.exit_logits, after.exit_logits, strict=True))
        assert (again.lm_head.weight is again.get_input_embeddings().weight) is tied


def test_checkpoints_of_the_trainer_of_a_resized_model_load(
    load: Callable[..., Any], tokens: Tensor, tmp_path: Path
) -> None:
    model = load("llama", RECIPES["exits"])
    model.resize_token_embeddings(104, mean_resizing=False)
    rows = [{"input_ids": row.clamp(max=103), "labels": row + 8} for row in tokens]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    Trainer(model=model, args=arguments, train_dataset=cast(Any, rows)).train()
    again = load_model(tmp_path / "checkpoint-2", device="cpu")
    assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)


def test_the_stack_alone_resizes_as_well(load: Callable[..., Any], tokens: Tensor) -> None:
    stack = load("llama", RECIPES["exits"]).model
    stack.resize_token_embeddings(100)
    assert stack.config.read_blueprint().arch.vocab_size == 100
    assert stack(tokens + 4).last_hidden_state.isfinite().all()


@pytest.fixture
def short(make_source: Callable[..., Path], make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A source whose tokenizer has 300 tokens and whose embedding has 96."""
    folder = tmp_path / "short"
    shutil.copytree(make_model(), folder)
    shutil.copytree(make_source("llama"), folder, dirs_exist_ok=True)
    return folder


def test_a_tokenizer_longer_than_the_embedding_is_named(
    short: Path, tmp_path: Path, sentences: tuple[str, ...]
) -> None:
    convert(short, tmp_path / "fold", RECIPES["strict"])
    wanted = r"tokens below the model's 96 are required \(got \d+\); use the tokenizer .* or resize"
    data = from_documents(sentences * 20)
    for folder in (short, tmp_path / "fold"):
        with pytest.raises(DataError, match=f"documents in memory: {wanted}"):
            evaluate(folder, data, EvaluationSettings(device="cpu"))
        with pytest.raises(DataError, match=f"prompt: {wanted}"):
            generate(folder, "The sea was calm", device="cpu")
    with pytest.raises(DataError, match=f"calibration: documents in memory: {wanted}"):
        analyse(short, tmp_path / "analysis", data)


def test_an_embedding_of_more_rows_than_the_config_says_is_named(
    make_source: Callable[..., Path], tmp_path: Path
) -> None:
    for file in make_source("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 90}))
    with pytest.raises(SourceError, match=r"shape \[90, 32\] is required .*set vocab_size to 96 in config.json"):
        plan(tmp_path, RECIPES["strict"])
