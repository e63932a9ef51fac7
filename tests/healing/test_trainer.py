import pytest
import torch
from transformers import Trainer, TrainingArguments

from refold.conversion.convert import ConvertOptions, convert
from refold.data.packing import PackedSequences
from refold.data.tokens import tokenise
from refold.modeling.load import load_model, load_tokenizer

RECIPES = {
    "strict": {"fold": {"loops": 2}},
    "relaxed": {"fold": {"loops": 2}, "relax": {"type": "lora", "rank": 4, "vectors": "own"}},
    "retention": {"mixers": [{"type": "retention", "depths": [1]}]},
    "states alone": {"mixers": [{"type": "gated_deltanet", "depths": "all"}]},
    "exits": {"fold": {"loops": 2}, "exits": {"at": "loops"}},
}


@pytest.fixture
def rows(folded, documents):
    """Sequences as Trainer wants them: labels not shifted, since the model shifts them itself."""
    found = tokenise(documents, load_tokenizer(folded), budget=None, seed=0)
    packed = PackedSequences(found.tokens, found.offsets, 16, 0)
    return [
        {"input_ids": row.input_ids, "position_ids": row.position_ids, "labels": row.input_ids}
        for row in map(packed.sequence, range(len(packed)))
    ]


def test_transformers_trainer_trains_saves_and_reloads_a_fold(folded, rows, tmp_path):
    model = load_model(folded, dtype="float32", device="cpu")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=15,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    again = load_model(tmp_path / "saved", device="cpu")
    ids = rows[0]["input_ids"][None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_transformers_trainer_evaluates_every_kind_of_fold_while_it_trains(recipe, rows, source, tmp_path):
    convert(source, tmp_path / "fold", recipe, options=ConvertOptions(allow_larger=True))
    model = load_model(tmp_path / "fold", dtype="float32", device="cpu")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows[:8], eval_dataset=rows[:3])
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    found = trainer.predict(rows[:3])
    # Logits alone: neither caches nor exits are gathered over batches.
    assert not isinstance(found.predictions, tuple)
    assert found.predictions.shape == (3, 16, model.config.vocab_size)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[-1], rel=1e-5)
