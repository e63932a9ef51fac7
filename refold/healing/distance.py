"""Distance of a student from its teacher at the start of a stage: the difference of their losses."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from refold.data.packing import PackedSequence
from refold.healing.defaults import excess_loss
from refold.scoring.agreement import Scores, score
from refold.scoring.predict import head_of, predict

MEASURED_TOKENS = 4096
"""Tokens that are scored. They give the distance to about 0.05 nats, which is enough to choose a learning rate."""


@dataclass(frozen=True)
class Distance:
    """Holds the losses of a student and of its teacher on the same tokens, in nats per token.

    Attributes:
        loss: Cross-entropy of the student.
        teacher_loss: Cross-entropy of the teacher; None if the stage has no teacher.
        vocab_size: Vocabulary size of the student.
    """

    loss: float
    teacher_loss: float | None
    vocab_size: int

    @property
    def nats(self) -> float:
        """Returns the excess of the student's loss over the teacher's; without a teacher see `excess_loss`."""
        if self.teacher_loss is None:
            return excess_loss(self.loss, self.vocab_size)
        return max(0.0, self.loss - self.teacher_loss)


@torch.no_grad()
def measure_distance(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batch: PackedSequence,
    autocast: torch.dtype | None,
) -> Distance | None:
    """Scores the same sequences with student and teacher; the student returns to its previous training mode.

    Args:
        student: Model with float32 weights.
        teacher: None if the stage has no teacher.
        batch: Sequences of the stage, `[B, T]`.
        autocast: Dtype of matrix products; None: float32.

    Returns:
        The losses; None if no token of the sequences is scored.
    """
    was_training = student.training
    student.eval()
    loss = _mean_loss(student, batch, autocast)
    student.train(was_training)
    if loss is None:
        return None
    teacher_loss = None if teacher is None else _mean_loss(teacher.eval(), batch, autocast)
    return Distance(loss, teacher_loss, head_of(student).vocab_size)


def _mean_loss(model: PreTrainedModel, batch: PackedSequence, autocast: torch.dtype | None) -> float | None:
    total, device = Scores(), model.device
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        for index in range(len(batch.labels)):
            ids, positions, labels = (part[index : index + 1].to(device) for part in batch)
            total += score(predict(model, ids, position_ids=positions), labels)
    return total.nll / total.num_tokens if total.num_tokens else None
