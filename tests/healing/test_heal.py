import json

import pytest
import torch

from refold.checkpoint import provenance
from refold.checkpoint.manifest import verify
from refold.data.readers import from_documents
from refold.errors import DataError, FolderError, HealError, SourceError
from refold.modeling.load import load_model, load_tokenizer


def test_the_loss_falls_and_the_folder_is_whole(healing, folded, weights):
    result = healing({"tokens": 40 * 64})
    assert result.steps == 40
    assert result.tokens == 40 * 64
    assert result.skipped_steps == 0
    assert result.resumed_from is None
    first, last = healing.records[0], healing.records[-1]
    assert last.loss < 0.8 * first.loss
    assert {"loss", "cross_entropy", "forward_kl"} == set(result.losses)
    for record in healing.records:
        parts = record.objectives
        assert record.loss == pytest.approx(0.5 * parts["cross_entropy"] + 0.5 * parts["forward_kl"], rel=1e-5)

    assert verify(healing.destination) == ()
    assert not healing.work.exists()
    assert sorted(path.name for path in healing.destination.parent.iterdir()) == ["healed"]
    for name in ("config.json", "plan.json", "tokenizer.json"):
        assert (healing.destination / name).read_bytes() == (folded / name).read_bytes()
    before, after = weights(folded), weights(healing.destination)
    assert {name: (value.shape, value.dtype) for name, value in before.items()} == {
        name: (value.shape, value.dtype) for name, value in after.items()
    }
    assert all(not torch.equal(before[name], after[name]) for name in before)
    load_tokenizer(healing.destination)


def test_the_history_and_the_card_say_what_was_done(healing, folded):
    healing({"seed": 3}, command="refold heal in out")
    convert, heal = provenance.read(healing.destination)
    assert (convert.stage, heal.stage) == ("convert", "heal")
    assert (heal.tokens, heal.seed, heal.command) == (12 * 64, 3, "refold heal in out")
    assert heal.source["path"] == str(folded)
    assert heal.recipe["precision"] == "float32"
    assert provenance.teacher(healing.destination).path == provenance.teacher(folded).path
    card = (healing.destination / "README.md").read_text()
    assert "folded and healed" in card
    assert "| healing | distil, 768 tokens, 64 a step, learning rate 0.01 |" in card
    assert "| weight bytes |" in card
    assert card.count("base_model: ") == 1
    lines = [json.loads(line) for line in (healing.destination / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert set(lines[0]) == {
        "step",
        "tokens",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "skipped",
        "stage",
        "cross_entropy",
        "forward_kl",
    }


def test_a_healed_folder_can_be_healed_again(healing, tmp_path):
    healing()
    again = tmp_path / "again"
    healing(model=healing.destination, destination=again)
    assert [stage.stage for stage in provenance.read(again)] == ["convert", "heal", "heal"]
    # The second run began where the first one ended.
    assert healing.records[12].loss < 0.9 * healing.records[0].loss


def test_a_source_is_trained_as_it_is_and_learns_from_itself(healing, source, weights):
    result = healing(model=source)
    config = json.loads((healing.destination / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert healing.records[0].objectives["forward_kl"] == pytest.approx(0, abs=1e-3)
    assert healing.records[-1].objectives["forward_kl"] > 1e-2
    assert result.losses["cross_entropy"] < healing.records[0].objectives["cross_entropy"]
    before, after = weights(source), weights(healing.destination)
    assert {name: value.dtype for name, value in before.items()} == {name: value.dtype for name, value in after.items()}
    load_model(healing.destination, device="cpu")
    assert "trained further" in (healing.destination / "README.md").read_text()


def test_next_token_needs_no_teacher(healing):
    healing({"objective": "next_token"})
    assert all(set(record.objectives) == {"cross_entropy"} for record in healing.records)
    assert all(record.loss == record.objectives["cross_entropy"] for record in healing.records)


def test_a_teacher_for_next_token_is_refused(healing, source):
    with pytest.raises(HealError, match="teacher: an objective that learns from one is required"):
        healing({"objective": "next_token"}, teacher=source)


def test_a_teacher_that_is_gone_is_named_and_another_can_be_given(healing, folded, source, tmp_path, monkeypatch):
    stages = provenance.read(folded)
    lost = tmp_path / "lost"
    lost.mkdir()
    for path in folded.iterdir():
        (lost / path.name).write_bytes(path.read_bytes())
    stages[0].source["path"] = str(tmp_path / "nowhere")
    monkeypatch.setattr(provenance, "read", lambda folder: stages)
    with pytest.raises(SourceError, match=r"its source .*nowhere is required \(missing\)"):
        healing(model=lost)
    assert not healing.destination.exists()
    healing(model=lost, teacher=source)


def test_a_teacher_of_another_vocabulary_is_refused(healing, make_source):
    with pytest.raises(SourceError, match="must share one vocabulary"):
        healing(teacher=make_source("llama", vocab_size=100))


def test_tokens_the_model_does_not_know_are_refused(healing, make_source, source, tmp_path):
    small = make_source("llama", vocab_size=20, bos_token_id=1, eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).write_bytes((source / name).read_bytes())
    with pytest.raises(DataError, match=r"tokens below the model's 20 are required \(got \d+\)"):
        healing(model=small)


def test_a_destination_that_is_taken_is_refused_before_any_work(healing):
    healing.destination.mkdir()
    (healing.destination / "mine.txt").write_text("kept")
    with pytest.raises(FolderError, match="never overwritten"):
        healing()
    assert healing.records == []
    assert (healing.destination / "mine.txt").read_text() == "kept"


def test_an_old_result_is_replaced_only_when_asked(healing):
    healing()
    with pytest.raises(FolderError, match="pass --overwrite"):
        healing({"seed": 1})
    healing({"seed": 1}, overwrite=True)
    assert provenance.read(healing.destination)[-1].seed == 1


def test_a_second_run_on_one_output_is_refused(healing):
    failures = []

    def start_another(record):
        if record.step == 2:
            with pytest.raises(FolderError, match="one writer at a time") as failure:
                healing()
            failures.append(failure)

    healing.hook = start_another
    healing()
    assert len(failures) == 1


def test_little_data_is_seen_again(healing):
    result = healing(data=from_documents(["a rather short text.", "another one."]))
    assert result.epochs > 10
    assert healing.records[-1].loss < healing.records[0].loss


def test_the_context_is_what_the_model_was_made_for(healing):
    healing({"tokens": 600, "context": None, "batch_tokens": 512})
    assert provenance.read(healing.destination)[-1].recipe["context"] == 256


def test_the_callers_random_numbers_are_left_alone(healing):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    healing()
    assert torch.equal(torch.rand(3), expected)


def test_a_process_that_accelerate_set_up_otherwise_is_refused(healing, monkeypatch):
    def refuse(**_):
        raise ValueError("AcceleratorState has already been initialized\nand more")

    monkeypatch.setattr("refold.healing.team.Accelerator", refuse)
    with pytest.raises(HealError, match=r"without mixed precision is required \(AcceleratorState has already"):
        healing()


def test_a_teacher_with_another_tokenizer_is_refused(healing, source, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(source, other)
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"a":', '"a2":', 1).replace('"b":', '"a":', 1).replace('"a2":', '"b":', 1))
    with pytest.raises(SourceError, match=r"student's tokenizer is required \(2 tokens differ, such as 'a'\)"):
        healing(teacher=other)
    assert not healing.destination.exists()
