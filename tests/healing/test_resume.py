import json
import os
import shutil
import signal

import pytest
import torch

from refold.checkpoint.reader import CheckpointReader
from refold.data.readers import from_documents
from refold.errors import FolderError, HealError
from refold.healing.interruption import HealInterrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _stop_after(step, number=signal.SIGTERM):
    return lambda record: signal.raise_signal(number) if record.step == step else None


def _checkpoints(work):
    return sorted(path.name for path in (work / "checkpoints").iterdir())


def test_an_interrupted_run_goes_on_to_the_same_bits(healing, tmp_path, weights):
    healing(destination=tmp_path / "whole")
    expected = list(healing.records)
    healing.records.clear()
    for step in (3, 7):
        healing.hook = _stop_after(step)
        with pytest.raises(HealInterrupted, match=f"interrupted after step {step} of 12, which is saved"):
            healing()
        assert not healing.destination.exists()
    healing.hook = None
    result = healing()
    assert result.resumed_from == 7
    assert [record.step for record in healing.records] == list(range(1, 13))
    for mine, other in zip(healing.records, expected, strict=True):
        assert (mine.loss, mine.grad_norm, mine.learning_rate) == (other.loss, other.grad_norm, other.learning_rate)
    whole, resumed = weights(tmp_path / "whole"), weights(healing.destination)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    log = [json.loads(line) for line in (healing.destination / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 13))


def test_weights_and_optimizer_are_the_same_to_the_bit_at_a_checkpoint(healing, tmp_path):
    healing.hook = _stop_after(6)
    with pytest.raises(HealInterrupted):
        healing()
    other = tmp_path / "other"
    healing.hook = _stop_after(2)
    with pytest.raises(HealInterrupted):
        healing(destination=other)
    healing.hook = _stop_after(6)
    with pytest.raises(HealInterrupted):
        healing(destination=other)
    name = "checkpoints/step-000000006"
    with CheckpointReader(healing.work / name) as one, CheckpointReader(tmp_path / ".other.heal" / name) as two:
        assert one.names() == two.names()
        assert any(name.endswith("exp_avg_sq") for name in one.names())
        assert all(torch.equal(one.read(name), two.read(name)) for name in one.names())


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(healing, number, exit_code):
    # The handlers before the run differ: a shell ignores SIGINT for background processes, nohup ignores SIGHUP.
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = [signal.getsignal(each) for each in SIGNALS]
    healing.hook = _stop_after(2, number)
    with pytest.raises(HealInterrupted) as caught:
        healing()
    assert caught.value.exit_code == exit_code
    assert _checkpoints(healing.work) == ["step-000000002"]
    assert [signal.getsignal(each) for each in SIGNALS] == before
    signal.signal(signal.SIGHUP, hangup)


def test_the_newest_two_checkpoints_are_kept(healing):
    healing.hook = _stop_after(5)
    with pytest.raises(HealInterrupted):
        healing(checkpoint_seconds=0.0)
    assert _checkpoints(healing.work) == ["step-000000004", "step-000000005"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_torn_checkpoint_is_skipped_with_a_line(healing, capfd, damage):
    healing.hook = _stop_after(5)
    with pytest.raises(HealInterrupted):
        healing(checkpoint_seconds=0.0)
    file = healing.work / "checkpoints/step-000000005/model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[:-1])
    elif damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    healing.hook = None
    assert healing().resumed_from == 4
    assert "checkpoint step-000000005 is torn and skipped" in capfd.readouterr().err
    assert [record.step for record in healing.records][4:7] == [5, 5, 6]
    assert healing.records[4].loss == healing.records[5].loss


def test_other_settings_do_not_resume_and_are_named(healing, make_source):
    healing.hook = _stop_after(2)
    with pytest.raises(HealInterrupted):
        healing()
    healing.hook = None
    with pytest.raises(HealError, match=r"with other settings .*\(learning_rate was 0.01, is 0.02\); repeat its"):
        healing({"learning_rate": 2e-2})
    assert healing({"learning_rate": 2e-2}, restart=True).resumed_from is None


def test_another_model_or_text_does_not_resume(healing, source, tmp_path):
    healing.hook = _stop_after(2)
    with pytest.raises(HealInterrupted):
        healing()
    healing.hook = None
    with pytest.raises(HealError, match=r"\(model weights was"):
        healing(model=source)
    changed = tmp_path / "changed"
    shutil.copytree(healing.model, changed)
    weights = changed / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(HealError, match=r"\(model weights was"):
        healing(model=changed)
    blocks = type(healing.data.blocks[0])(healing.data.blocks[0].documents()[:50])
    with pytest.raises(HealError, match=r"\(data was"):
        healing(data=type(healing.data)((blocks,), "another", "another"))


def test_another_teacher_or_held_out_text_does_not_resume(healing, source, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(source, teacher)
    arguments = {"teacher": teacher, "held_out": from_documents(["a goes to aaaa."])}
    healing.hook = _stop_after(2)
    with pytest.raises(HealInterrupted):
        healing(**arguments)
    healing.hook = None
    with pytest.raises(HealError, match=r"\(held_out was"):
        healing(**{**arguments, "held_out": from_documents(["b goes to bbbb."])})
    weights = bytearray((teacher / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (teacher / "model.safetensors").write_bytes(weights)
    with pytest.raises(HealError, match=r"\(teacher was"):
        healing(**arguments)


def test_what_a_run_killed_before_its_first_checkpoint_found_is_not_taken_up_by_another(healing, monkeypatch):
    healing.work.mkdir()  # so that a run that fails leaves it, as a killed one would

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("refold.healing.loop.Loop.run", kill)
        with pytest.raises(KeyboardInterrupt):
            healing()
    with pytest.raises(HealError, match=r"with other settings .*\(learning_rate was 0.01, is 0.02\)"):
        healing({"learning_rate": 2e-2})
    assert healing().resumed_from is None


def test_a_failed_write_at_the_end_costs_no_training(healing, monkeypatch):
    from refold.healing import heal as module

    def fail(*_):
        raise FolderError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_healed", fail)
        with pytest.raises(FolderError, match="disk full"):
            healing()
    assert not healing.destination.exists()
    result = healing()
    assert result.resumed_from == 12
    assert len(healing.records) == 12


@pytest.mark.parametrize("name", ["start.json", "sweep-1.json"])
def test_a_kill_while_a_finding_is_noted_costs_only_that(healing, monkeypatch, name):
    replace = os.replace

    def kill(old, new):
        if new.name == name:
            raise KeyboardInterrupt
        replace(old, new)

    arguments = {"held_out": from_documents(["a goes to aaaa."]), "sweep": True}
    healing.work.mkdir()  # so that a run that fails leaves it, as a killed one would
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            healing(**arguments)
    (healing.work / f".{name}.1.unfinished").write_text("[{")
    assert not (healing.work / name).exists()
    assert min(healing(**arguments).held_out) == 0


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(healing, monkeypatch):
    usage = shutil.disk_usage
    healing.hook = lambda record: (
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=10))
        if record.step == 4
        else None
    )
    with pytest.raises(FolderError, match=r"step-000000004: \d+ bytes of disk are required \(free: 10\)"):
        healing(checkpoint_seconds=0.0)
    assert _checkpoints(healing.work) == ["step-000000002", "step-000000003"]
    monkeypatch.undo()
    healing.hook = None
    assert healing().resumed_from == 3


def test_space_for_all_checkpoints_is_asked_for_at_the_start(healing, monkeypatch):
    usage, seen = shutil.disk_usage, []
    # Enough for the result and for one checkpoint.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=300_000))
    healing.hook = seen.append
    with pytest.raises(FolderError, match=r"bytes of disk are required for 3 checkpoints \(free: 300,000\)"):
        healing()
    assert not seen
    assert not healing.work.exists()


def test_a_resumed_run_keeps_the_settings_that_were_chosen_for_it(healing, tmp_path, monkeypatch, weights):
    stage = {"learning_rate": None, "batch_tokens": None, "warmup": None, "context": None, "tokens": 4000}
    whole = healing(stage, destination=tmp_path / "whole")
    healing.hook = _stop_after(3)
    with pytest.raises(HealInterrupted):
        healing(stage)
    healing.hook = None
    # A later version may choose otherwise; the run goes on with its own choice.
    monkeypatch.setattr("refold.healing.choices.choose_learning_rate", lambda *_: 1.0)
    monkeypatch.setattr("refold.healing.choices.complete_stage", lambda *_: 1 / 0)
    result = healing(stage)
    assert result.resumed_from == 3
    assert result.stages == whole.stages
    expected, found = weights(tmp_path / "whole"), weights(healing.destination)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_kill_while_the_learning_rate_is_noted_costs_only_that(healing, monkeypatch):
    replace = os.replace

    def kill(old, new):
        if new.name == "learning-rate-1.json":
            raise KeyboardInterrupt
        replace(old, new)

    stage = {"learning_rate": None}
    healing.work.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            healing(stage)
    assert healing(stage).resumed_from is None


def test_an_unfinished_run_does_not_hide_the_real_mistake(healing, source):
    healing.hook = _stop_after(2)
    with pytest.raises(HealInterrupted):
        healing()
    healing.hook = None
    with pytest.raises(HealError, match=r"report_to: one of .* is required"):
        healing({"learning_rate": 2e-2}, report_to=("tensorbord",))
    with pytest.raises(HealError, match="objective exits"):
        healing({"objective": "exits"})
