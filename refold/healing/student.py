"""The models of a training step: the student wrapped with its loss, and the teacher it learns from."""

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from refold.healing.objectives.objective import Objective
from refold.scoring.chunked import ChunkedLoss
from refold.scoring.head import Predictions
from refold.scoring.predict import predict


class TrainingModel(nn.Module):
    """The student together with its loss: one module, so that what wraps it for several processes sees one forward.

    Args:
        student: float32 weights.
        objective: what is minimised.
        autocast: dtype that matrix products run in; None: float32.
    """

    def __init__(self, student: PreTrainedModel, objective: Objective, autocast: torch.dtype | None):
        super().__init__()
        self.student = student
        self.objective = objective
        self.autocast = autocast

    def forward(
        self,
        input_ids: Int64[Tensor, "B T"],
        position_ids: Int64[Tensor, "B T"],
        labels: Int64[Tensor, "B T"],
        teacher: Predictions | None,
        num_tokens: int,
    ) -> ChunkedLoss:
        """Returns the loss of one micro-batch; `teacher` and `num_tokens` as for `Objective.loss`."""
        with torch.autocast(input_ids.device.type, self.autocast, enabled=self.autocast is not None):
            predictions = predict(self.student, input_ids, position_ids=position_ids)
            return self.objective.loss(predictions, labels, teacher, num_tokens)


class Teacher:
    """A frozen model, in the dtype it is stored in; its matrix products run in autocast's, as the student's do."""

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype | None):
        self.model = model.eval().requires_grad_(False)
        self.autocast = autocast

    @torch.no_grad()
    def predict(self, input_ids: Int64[Tensor, "B T"], position_ids: Int64[Tensor, "B T"]) -> Predictions:
        """Returns its predictions, documents kept apart."""
        with torch.autocast(input_ids.device.type, self.autocast, enabled=self.autocast is not None):
            return predict(self.model, input_ids, position_ids=position_ids)
