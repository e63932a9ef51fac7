"""Runs of several stages, with groups, thawing, sweeps and held-out text."""

import json
import signal

import pytest
import torch

from refold.checkpoint import provenance
from refold.data.readers import from_documents
from refold.errors import DataError, HealError
from refold.healing.interruption import HealInterrupted
from refold.healing.probe import probe


def _stop_after(step):
    return lambda record: signal.raise_signal(signal.SIGTERM) if record.step == step else None


@pytest.fixture
def two_stages(healing):
    adapters = healing.stage(tokens=4 * 64, objective="next_token", train=["adapters"])
    thawing = healing.stage(
        tokens=6 * 64, thaw={"groups": ["mlps"], "when": "share", "latest": 0.5, "warmup": 0.2}, optimizer="muon"
    )
    return [adapters, thawing]


def test_stages_follow_each_other_and_each_trains_what_it_names(healing, two_stages, weights):
    healing.hook = _stop_after(4)
    with pytest.raises(HealInterrupted):
        healing(stages=two_stages)
    # After the first stage only adapters have moved.
    newest = sorted((healing.work / "checkpoints").iterdir())[-1]
    start, after = weights(healing.model), weights(newest)
    moved = {name for name in start if not torch.equal(start[name].float(), after[f"model.{name}"])}
    assert moved
    assert all(".lora." in name for name in moved)
    healing.hook = None
    result = healing(stages=two_stages)
    assert (result.tokens, result.steps, result.resumed_from) == (640, 10, 4)
    records = healing.records[-6:]
    assert [record.frozen for record in records] == [True, True, False, False, False, False]
    assert [record.stage for record in healing.records] == [1] * 4 + [2] * 6
    assert [record.tokens for record in healing.records] == [64 * step for step in range(1, 11)]
    told = [stage.recipe for stage in provenance.read(healing.destination) if stage.stage == "heal"]
    assert [list(recipe["objective"]) for recipe in told] == [["next_token"], ["distil"]]


def test_frozen_weights_move_only_after_the_thaw(healing, two_stages, weights):
    healing.hook = _stop_after(3)
    with pytest.raises(HealInterrupted):
        healing(stages=two_stages[1:])
    start, after = weights(healing.model), weights(sorted((healing.work / "checkpoints").iterdir())[-1])
    assert all(torch.equal(start[n].float(), after[f"model.{n}"]) for n in start if n.startswith("model.mlps."))
    assert not torch.equal(start["model.mixers.0.q_proj.weight"].float(), after["model.model.mixers.0.q_proj.weight"])
    healing.hook = None
    healing(stages=two_stages[1:])
    final = weights(healing.destination)
    assert not torch.equal(start["model.mlps.0.up_proj.weight"], final["model.mlps.0.up_proj.weight"])


@pytest.mark.parametrize("step", [2, 4, 6, 9])
def test_an_interrupted_run_of_two_stages_ends_with_the_same_bits(healing, two_stages, tmp_path, weights, step):
    healing(stages=two_stages, destination=tmp_path / "whole")
    healing.hook = _stop_after(step)
    with pytest.raises(HealInterrupted):
        healing(stages=two_stages)
    healing.hook = None
    assert healing(stages=two_stages).resumed_from == step
    whole, resumed = weights(tmp_path / "whole"), weights(healing.destination)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    logs = [(folder / "train.jsonl").read_text() for folder in (tmp_path / "whole", healing.destination)]
    first, second = ([{**json.loads(line), "tokens_per_second": 0} for line in log.splitlines()] for log in logs)
    assert first == second


def test_a_later_stage_reads_on_in_the_data(healing, monkeypatch):
    from refold.healing.loop import Loop

    seen = []
    step = Loop.step
    monkeypatch.setattr(Loop, "step", lambda self: seen.append(self.schedule.sequences(self.state.step)) or step(self))
    healing(stages=[healing.stage(tokens=2 * 64), healing.stage(tokens=2 * 64)])
    assert seen == [range(4), range(4, 8), range(8, 12), range(12, 16)]


def test_held_out_text_is_measured_before_between_and_after(healing):
    held_out = from_documents(["a goes to aaaa.", "b goes to bbbbb."])
    result = healing(held_out=held_out)
    assert min(result.held_out) == 0
    assert max(result.held_out) == 12
    assert result.held_out[12] < result.held_out[0]
    assert " -> " in result.line
    assert [r.step for r in healing.records if r.held_out is not None] == [2, 4, 6, 8, 10, 12]


def test_a_sweep_takes_the_best_rate_and_starts_from_the_same_weights(healing, tmp_path, weights):
    result = healing({"learning_rate": 1e-5}, sweep=True)
    (best,) = result.learning_rates
    assert best == pytest.approx(3e-5)  # on so few steps the highest of three tiny rates learns most
    healing({"learning_rate": best}, destination=tmp_path / "plain")
    swept, plain = weights(healing.destination), weights(tmp_path / "plain")
    assert all(torch.equal(swept[name], plain[name]) for name in swept)


def test_gradient_checkpointing_changes_no_gradient(healing, tmp_path):
    healing({"tokens": 3 * 64, "gradient_checkpointing": True})
    healing({"tokens": 3 * 64}, destination=tmp_path / "plain")
    for mine, other in zip(healing.records[:3], healing.records[3:], strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=1e-6)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)


def test_a_teacher_is_trained_first_where_that_is_asked_for(healing, tmp_path, capfd):
    healing({"tokens": 2 * 64})
    healing({"tokens": 2 * 64, "teacher_tokens": 256}, destination=tmp_path / "other", quiet=False)
    assert "training the teacher for 256 tokens" in capfd.readouterr().err
    plain, trained = healing.records[0], healing.records[-2]
    assert plain.objectives["cross_entropy"] == trained.objectives["cross_entropy"]
    assert plain.objectives["forward_kl"] != trained.objectives["forward_kl"]


def test_a_probe_tells_what_a_run_takes_and_leaves_nothing(healing, documents, tmp_path):
    before = set(healing.destination.parent.iterdir())
    stage = healing.stage(tokens=100_000, teacher_tokens=50_000)
    found = probe(healing.model, documents, [stage, stage], device="cpu", quiet=True)
    assert set(healing.destination.parent.iterdir()) == before
    assert found.tokens == 300_000
    assert found.hours == pytest.approx(300_000 / found.tokens_per_second / 3600)
    assert found.steps == 2 * -(-100_000 // 64)
    assert found.peak_memory_bytes > 50_000_000
    assert "300,000 tokens" in found.line
    with pytest.raises(DataError, match=r"an existing file or folder is required"):
        probe(healing.model, documents, stage, held_out=tmp_path / "none.txt", device="cpu", quiet=True)


def test_what_cannot_be_is_refused_before_training(healing):
    with pytest.raises(HealError, match=r"context: must be at most the model's \d+ positions \(got 100000\)"):
        healing({"context": 100_000})
    with pytest.raises(HealError, match=r"report_to: one of .* \(got 'tensorbord'\); did you mean 'tensorboard'"):
        healing(report_to=("tensorbord",))
    assert not healing.destination.exists()
    assert not healing.work.exists()
    assert not healing.records


def test_running_out_of_memory_is_told_with_what_to_change(healing, monkeypatch):
    from refold.healing.student import TrainingModel

    def burst(self, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(TrainingModel, "forward", burst)
    with pytest.raises(HealError, match=r"enough memory .* 4 sequences .* no checkpoint yet; set micro_batch below 4"):
        healing()


def test_stored_predictions_teach_like_a_teacher_that_runs_along(healing, tmp_path, capfd):
    vocab_size = 96
    healing({"tokens": 4 * 64, "objective": {"distil": {"top_k": vocab_size}}}, quiet=False)
    told = capfd.readouterr().err
    assert "storing the teacher's 96 likeliest of 256 tokens" in told
    healing({"tokens": 4 * 64}, destination=tmp_path / "live")
    for mine, other in zip(healing.records[:4], healing.records[4:], strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=2e-3)  # stored in half precision
    few = tmp_path / "few"
    healing({"tokens": 4 * 64, "objective": {"distil": {"top_k": 2}}}, destination=few)
    assert healing.records[-1].objectives["forward_kl"] < healing.records[3].objectives["forward_kl"]


def test_a_mixture_of_files_is_healed_on(healing, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} goes to {name * 5}.\n" * 200)
    result = healing(data=[f"{tmp_path}/one.txt=0.75", f"{tmp_path}/two.txt=0.25"])
    assert result.tokens == 12 * 64


@pytest.mark.parametrize("objective", ["mixer_outputs", "hidden_states", "attention_matrices"])
def test_alignment_brings_a_student_nearer_to_its_teacher(healing, objective):
    healing({"objective": objective, "train": ["mixers", "mlps"], "tokens": 48 * 64})
    losses = [record.loss for record in healing.records]
    assert sum(losses[-8:]) < 0.85 * sum(losses[:8])
