"""The models of a training step: the student wrapped with its losses, and the teacher it learns from."""

from collections.abc import Mapping

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from refold.errors import HealError
from refold.healing.activations import Activations, Want, observe
from refold.healing.objectives.objective import Loss, Objective, Step
from refold.modeling.model import RefoldForCausalLM
from refold.scoring.head import check_same_vocabulary
from refold.scoring.predict import head_of
from refold.scoring.stored import StoredPredictions


class TrainingModel(nn.Module):
    """Computes the losses of the student. It is one module, so that a wrapper for several processes sees one forward.

    Args:
        student: model with float32 weights.

    Attributes:
        objectives: the objectives by name; their weighted sum is minimised. `begin` sets them.
    """

    def __init__(self, student: PreTrainedModel):
        super().__init__()
        self.student = student
        self.objectives: Mapping[str, Objective] = {}
        self._autocast: torch.dtype | None = None
        self._wants = frozenset[Want]()

    def begin(self, objectives: Mapping[str, Objective], autocast: torch.dtype | None) -> "TrainingModel":
        """Begins a stage.

        Args:
            objectives: objectives of the stage, by name.
            autocast: dtype of matrix products; None: float32.
        """
        self.objectives, self._autocast = objectives, autocast
        self._wants = frozenset[Want]().union(*(objective.student_wants for objective in objectives.values()))
        return self

    def forward(
        self,
        input_ids: Int64[Tensor, "B T"],
        position_ids: Int64[Tensor, "B T"],
        labels: Int64[Tensor, "B T"],
        teacher: Activations | None,
        num_tokens: int,
        stored: StoredPredictions | None = None,
    ) -> Loss:
        """Returns the weighted loss of one micro-batch and all its parts; arguments as in `Step`."""
        with torch.autocast(input_ids.device.type, self._autocast, enabled=self._autocast is not None):
            student = observe(self.student, input_ids, position_ids, self._wants) if self._wants else None
            step = Step(self.student, input_ids, position_ids, labels, num_tokens, student, teacher, stored)
            total: Tensor | None = None
            means: dict[str, Tensor] = {}
            for objective in self.objectives.values():
                found = objective.loss(step)
                weight = objective.options.weight
                # A multiplication by 1 would copy the head's gradient, see `chunked_loss`.
                part = found.total if weight == 1 else weight * found.total
                total = part if total is None else total + part
                means |= found.means
        assert total is not None
        return Loss(total, means)


class Teacher:
    """Runs the teacher: a frozen model in its stored dtype, with the student's dtype for matrix products.

    Args:
        model: the teacher's model.
        autocast: dtype of matrix products; None: float32.
        wants: activations that objectives read.
    """

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype | None, wants: frozenset[Want]):
        self.model = model.eval().requires_grad_(False)
        self.autocast = autocast
        self.wants = wants

    @torch.no_grad()
    def observe(self, input_ids: Int64[Tensor, "B T"], position_ids: Int64[Tensor, "B T"]) -> Activations:
        """Returns the requested activations, from one pass for all objectives. Documents do not see each other."""
        with torch.autocast(input_ids.device.type, self.autocast, enabled=self.autocast is not None):
            return observe(self.model, input_ids, position_ids, self.wants)


def teacher_wants(objectives: Mapping[str, Objective]) -> frozenset[Want]:
    """Returns the teacher's activations that the objectives read; empty: no teacher is needed in memory."""
    return frozenset[Want]().union(*(objective.teacher_wants for objective in objectives.values()))


def check_objectives(
    objectives: Mapping[str, Objective], student: PreTrainedModel, teacher: PreTrainedModel | None
) -> None:
    """Checks that the objectives can compare these models.

    Raises:
        HealError: an objective needs a folded student, or student and teacher do not fit.
        SourceError: the vocabularies differ.
    """
    if teacher is not None:
        check_same_vocabulary(head_of(student), head_of(teacher))
    for name, objective in objectives.items():
        if objective.needs_fold and not isinstance(student, RefoldForCausalLM):
            raise HealError(f"objective {name}: a folded model is required (got {type(student).__name__}); convert it")
        objective.check(student, teacher)
