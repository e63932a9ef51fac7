"""The objective `distil`: cross-entropy and a divergence from the teacher's distribution."""

from refold.healing.objectives.objective import Loss, Objective, Step
from refold.recipe import objectives as specs
from refold.scoring.chunked import Objectives, chunked_loss


class Distil(Objective[specs.DistilOptions]):
    """`cross_entropy * CE + divergence_weight * temperature^2 * D(teacher, student)`.

    The teacher runs beside the student, or its likeliest tokens are read from disk. Relaxed Recursive Transformers use
    forward KL (arXiv 2410.20672, section 3.6); the paper does not state the weights.
    """

    student_wants = frozenset({"predictions"})

    def __init__(self, options: specs.DistilOptions):
        super().__init__(options)
        if options.top_k is None:
            self.teacher_wants = frozenset({"predictions"})
        self.stored_top_k = options.top_k
        divergences = {options.divergence: options.divergence_weight}
        self._parts = Objectives(options.cross_entropy, divergences, options.temperature)

    def loss(self, step: Step) -> Loss:
        assert step.student is not None
        teacher = None if step.teacher is None else step.teacher.predictions
        assert self.stored_top_k is None or step.stored is not None
        found = chunked_loss(
            step.student.predictions,
            step.labels,
            self._parts,
            teacher=teacher,
            stored=None if self.stored_top_k is None else step.stored,
            num_tokens=step.num_tokens,
        )
        return Loss(found.total, found.means)
