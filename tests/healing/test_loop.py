import pytest
import torch

from refold.errors import HealError
from refold.healing.student import TrainingModel
from refold.healing.team import Team


def _spoil(monkeypatch, steps):
    """Makes the loss not finite in the given calls of the model, counted from 1."""
    forward, calls = TrainingModel.forward, []

    def spoiled(self, *arguments):
        calls.append(None)
        loss = forward(self, *arguments)
        return loss._replace(total=loss.total * float("nan")) if len(calls) in steps else loss

    monkeypatch.setattr(TrainingModel, "forward", spoiled)


def test_a_step_that_is_not_finite_changes_no_weight_and_is_logged(healing, monkeypatch):
    _spoil(monkeypatch, {3, 4})
    result = healing()
    assert result.skipped_steps == 2
    assert [record.step for record in healing.records if record.skipped] == [3, 4]
    lines = (healing.destination / "train.jsonl").read_text().splitlines()
    assert '"loss": null' in lines[2]
    assert "NaN" not in "".join(lines)
    assert all(torch.isfinite(torch.tensor(value)) for value in result.losses.values())


def test_an_infinite_gradient_is_skipped_too(healing, monkeypatch):
    step = torch.optim.AdamW.step
    taken = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: taken.append(1) or step(self, *a))

    def overflow(self, parameters, limit):
        norms.append(1)
        return float("inf") if len(norms) == 2 else float(torch.nn.utils.clip_grad_norm_(parameters, limit))

    norms: list[int] = []
    monkeypatch.setattr(Team, "clip", overflow)
    assert healing().skipped_steps == 1
    assert len(taken) == 11


def test_three_such_steps_in_a_row_end_the_run(healing, monkeypatch):
    _spoil(monkeypatch, {5, 6, 7})
    with pytest.raises(HealError, match=r"neither in 3 steps in a row, up to step 7; the last good .*step-000000004"):
        healing(checkpoint_seconds=0.0)
    assert not healing.destination.exists()


def test_no_checkpoint_is_written_between_bad_steps(healing, monkeypatch):
    _spoil(monkeypatch, {5, 6, 7})
    with pytest.raises(HealError, match=r"neither in 3 steps in a row, up to step 7; the last good .*step-000000004\)"):
        healing(checkpoint_seconds=0.0)
    assert sorted(path.name for path in (healing.work / "checkpoints").iterdir()) == [
        "step-000000003",
        "step-000000004",
    ]


def test_micro_batches_add_up_to_the_batch(healing, tmp_path):
    for size in (4, 1, 3):
        healing({"micro_batch": size, "tokens": 3 * 64}, destination=tmp_path / str(size))
    one, *others = (healing.records[first : first + 3] for first in (0, 3, 6))
    for records in others:
        assert records[0].loss == pytest.approx(one[0].loss, rel=1e-5)
        assert records[0].grad_norm == pytest.approx(one[0].grad_norm, rel=1e-4)
        assert records[-1].loss == pytest.approx(one[-1].loss, rel=1e-3)


def test_the_whole_batch_is_the_denominator(healing, monkeypatch):
    """The control of the test above: micro-batches that count only their own tokens give another loss."""
    forward = TrainingModel.forward
    healing({"micro_batch": 1, "tokens": 64})
    right = healing.records[0]

    def own_count(self, input_ids, position_ids, labels, teacher, num_tokens, stored):
        return forward(self, input_ids, position_ids, labels, teacher, int((labels != -100).sum()), stored)

    monkeypatch.setattr(TrainingModel, "forward", own_count)
    healing({"micro_batch": 1, "tokens": 64}, overwrite=True)
    assert healing.records[1].loss > 2 * right.loss


def test_the_gradient_is_clipped(healing, monkeypatch):
    clipped = []
    step = torch.optim.AdamW.step

    def watch(self, *arguments):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        clipped.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    healing({"gradient_clip": 0.01})
    assert min(record.grad_norm for record in healing.records) > 0.01
    assert clipped == pytest.approx([0.01] * 12, rel=1e-3)


def test_documents_of_one_sequence_do_not_see_each_other(healing, source):
    """A batch's loss is the mean over its documents' own losses, for a folded student, a source and the teacher."""
    from refold.data.packing import PackedSequence
    from refold.healing.objectives.registry import make_objectives
    from refold.healing.student import Teacher
    from refold.modeling.load import load_model

    torch.manual_seed(0)
    ids = torch.randint(3, 60, (1, 12))
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)
    labels[0, 4] = -100
    packed = PackedSequence(ids, positions, labels)
    alone = [PackedSequence(*(part[:, rows] for part in packed)) for rows in (slice(0, 5), slice(5, 12))]
    teacher = Teacher(load_model(source, dtype="float32", device="cpu"), None, frozenset({"predictions"}))
    for folder in (healing.model, source):
        student = load_model(folder, dtype="float32", device="cpu")
        model = TrainingModel(student).begin(make_objectives(healing.stage().objective), None)

        def loss(batch, student=model):
            return student(*batch, teacher.observe(batch.input_ids, batch.position_ids), 10).total.item()

        assert loss(packed) == pytest.approx(sum(map(loss, alone)), rel=1e-5)
        leaking = packed._replace(position_ids=torch.arange(12)[None])
        assert loss(leaking) != pytest.approx(sum(map(loss, alone)), rel=1e-3)
