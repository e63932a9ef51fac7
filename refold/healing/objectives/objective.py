"""What every healing objective offers."""

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Int64
from torch import Tensor

from refold.blueprint.recipe import HealStage
from refold.scoring.chunked import ChunkedLoss
from refold.scoring.head import Predictions


class Objective(ABC):
    """A loss over the student's predictions, made from the stage's settings.

    Attributes:
        needs_teacher: whether `loss` reads the teacher's predictions; only then is a teacher loaded.
    """

    needs_teacher: ClassVar[bool] = False

    def __init__(self, stage: HealStage):
        self.stage = stage

    @abstractmethod
    def loss(
        self, student: Predictions, labels: Int64[Tensor, "B T"], teacher: Predictions | None, num_tokens: int
    ) -> ChunkedLoss:
        """Returns the loss of one micro-batch and its parts.

        Args:
            student: the student's predictions.
            labels: the id each position predicts (already shifted), -100 for none.
            teacher: the teacher's predictions of the same positions, None where it is not needed.
            num_tokens: scored tokens of the whole batch, the denominator: micro-batches then add up.
        """
