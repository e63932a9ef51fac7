"""Cross-entropy with the next token."""

from jaxtyping import Int64
from torch import Tensor

from refold.healing.objectives.objective import Objective
from refold.scoring.chunked import ChunkedLoss, chunked_loss
from refold.scoring.head import Predictions


class NextToken(Objective):
    """`CE`: what the source was trained with."""

    def loss(
        self, student: Predictions, labels: Int64[Tensor, "B T"], teacher: Predictions | None, num_tokens: int
    ) -> ChunkedLoss:
        return chunked_loss(student, labels, num_tokens=num_tokens)
