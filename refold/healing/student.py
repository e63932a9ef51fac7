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
    """The student together with its losses: one module, so that what wraps it for several processes sees one forward.

    Args:
        student: float32 weights.

    Attributes:
        objectives: what is minimised, by name; their weighted sum. `begin` sets them.
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
            objectives: what it minimises.
            autocast: dtype that matrix products run in; None: float32.
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
                # A factor of one must not cost a copy of the head's gradient, see `chunked_loss`.
                part = found.total if weight == 1 else weight * found.total
                total = part if total is None else total + part
                means |= found.means
        assert total is not None
        return Loss(total, means)


class Teacher:
    """A frozen model, in the dtype it is stored in; its matrix products run in autocast's, as the student's do.

    Args:
        model: what the student learns from.
        autocast: as the student's.
        wants: what objectives read of its pass.
    """

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype | None, wants: frozenset[Want]):
        self.model = model.eval().requires_grad_(False)
        self.autocast = autocast
        self.wants = wants

    @torch.no_grad()
    def observe(self, input_ids: Int64[Tensor, "B T"], position_ids: Int64[Tensor, "B T"]) -> Activations:
        """Returns what is wanted of its pass, documents kept apart; one pass for all objectives."""
        with torch.autocast(input_ids.device.type, self.autocast, enabled=self.autocast is not None):
            return observe(self.model, input_ids, position_ids, self.wants)


def teacher_wants(objectives: Mapping[str, Objective]) -> frozenset[Want]:
    """Returns what all objectives together read of the teacher's pass; nothing: no teacher is needed."""
    return frozenset[Want]().union(*(objective.teacher_wants for objective in objectives.values()))


def check_objectives(
    objectives: Mapping[str, Objective], student: PreTrainedModel, teacher: PreTrainedModel | None
) -> None:
    """Refuses objectives that these models cannot have.

    Raises:
        HealError: the student is no folded model where it must be, or student and teacher do not fit.
        SourceError: the vocabularies differ.
    """
    if teacher is not None:
        check_same_vocabulary(head_of(student), head_of(teacher))
    for name, objective in objectives.items():
        if objective.needs_fold and not isinstance(student, RefoldForCausalLM):
            raise HealError(f"objective {name}: a folded model is required (got {type(student).__name__}); convert it")
        objective.check(student, teacher)
