import pytest
import torch
from transformers import Trainer, TrainingArguments

from refold.data.packing import PackedSequences
from refold.data.tokens import tokenise
from refold.modeling.load import load_model, load_tokenizer


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
