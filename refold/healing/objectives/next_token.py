"""The objective `next_token`: cross-entropy with the next token."""

from refold.healing.objectives.objective import Loss, Objective, Step
from refold.recipe import objectives as specs
from refold.scoring.chunked import chunked_loss


class NextToken(Objective[specs.NextTokenOptions]):
    """`CE`, the loss with which language models are pretrained."""

    student_wants = frozenset({"predictions"})

    def loss(self, step: Step) -> Loss:
        assert step.student is not None
        found = chunked_loss(step.student.predictions, step.labels, num_tokens=step.num_tokens)
        return Loss(found.total, found.means)
