"""Cross-entropy and forward KL to a teacher's distribution."""

from jaxtyping import Int64
from torch import Tensor

from refold.blueprint.recipe import HealStage
from refold.healing.objectives.objective import Objective
from refold.scoring.chunked import ChunkedLoss, Objectives, chunked_loss
from refold.scoring.head import Predictions


class Distil(Objective):
    """`ce_weight * CE + kl_weight * temperature^2 * KL(teacher || student)`, the teacher's logits computed online.

    Forward KL is the divergence RRT settles on (arXiv 2410.20672, section 3.6); it does not state the weights.
    """

    needs_teacher = True

    def __init__(self, stage: HealStage):
        super().__init__(stage)
        self._parts = Objectives(stage.ce_weight, {"forward_kl": stage.kl_weight}, stage.temperature)

    def loss(
        self, student: Predictions, labels: Int64[Tensor, "B T"], teacher: Predictions | None, num_tokens: int
    ) -> ChunkedLoss:
        return chunked_loss(student, labels, self._parts, teacher=teacher, num_tokens=num_tokens)
