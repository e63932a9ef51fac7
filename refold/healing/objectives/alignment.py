"""The base class of objectives that compare a student with its teacher depth by depth, and the distance they use.

Only scored positions are compared, the positions whose label is not -100. So their number is `Step.num_tokens`, the
denominator of all objectives, and the losses of micro-batches and processes sum to the mean of the whole step. Padding,
the last token of each piece of a document, and in a chat all turns except the assistant's are not scored. Mixers of
later positions still read these tokens.

Every loss is a sum over positions, and each position is normalised separately. So the loss does not depend on the
packing of documents.
"""

from abc import abstractmethod
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from refold.errors import HealError
from refold.healing.activations import Activations, mixing_layers, num_source_layers, source_layers
from refold.healing.objectives.objective import Loss, Objective, Step
from refold.modeling.model import RefoldForCausalLM
from refold.recipe import objectives as specs
from refold.scoring.head import scored_positions

SMALLEST_MEAN_SQUARE = 1e-8
"""Lower bound for the mean square of a target, so that a target of zeros does not divide by zero."""

OptionsType = TypeVar("OptionsType", bound=specs.ObjectiveOptions)


class Alignment(Objective[OptionsType]):
    """Computes the mean distance between depths of the student and the teacher.

    A stored part that several depths run is trained by all of these depths.
    """

    needs_fold = True
    name: ClassVar[str]
    """Name of the objective in recipes."""

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        assert isinstance(student, RefoldForCausalLM)
        assert teacher is not None
        for what, ours, theirs in (
            ("source layers", num_source_layers(student), num_source_layers(teacher)),
            ("hidden dimensions", student.config.hidden_size, teacher.config.hidden_size),
        ):
            if ours != theirs:
                raise HealError(
                    f"objective {self.name}: a teacher of {ours} {what}, as the student's source has, is required "
                    f"(got {theirs}); name the source as the teacher"
                )
        depths = self.depths(student)
        if not depths:
            raise HealError(f"objective {self.name}: a depth that can be compared is required (none is left)")
        sources = source_layers(student)
        there = self.teacher_layers(teacher)
        missing = sorted({sources[depth] for depth in depths} - there)
        if missing:
            raise HealError(
                f"objective {self.name}: a teacher that has what stands for source layers "
                f"{', '.join(map(str, missing))} is required (it is dropped there); name the source as the teacher"
            )

    def depths(self, student: RefoldForCausalLM) -> list[int]:
        """Returns the student's depths that are compared; the default is all depths with a mixer."""
        return mixing_layers(student)

    def teacher_layers(self, teacher: PreTrainedModel) -> set[int]:
        """Returns the source layers for which the teacher has a target; the default is all layers with a mixer."""
        sources = source_layers(teacher)
        return {sources[layer] for layer in mixing_layers(teacher)}

    def loss(self, step: Step) -> Loss:
        student = step.model
        assert isinstance(student, RefoldForCausalLM)
        depths = self.depths(student)
        total = self.sum_over_depths(step, student, depths, scored_positions(step.labels))
        mean = total / (len(depths) * max(1, step.num_tokens))
        return Loss(mean, {self.name: mean.detach()})

    @abstractmethod
    def sum_over_depths(
        self, step: Step, student: RefoldForCausalLM, depths: list[int], index: Int64[Tensor, "K"] | None
    ) -> Float[Tensor, ""]:
        """Returns the sum of distances over depths and scored positions.

        Args:
            step: the micro-batch.
            student: the student.
            depths: depths to compare.
            index: flat index of the scored positions; None: all positions.
        """


def teacher_layer_of(step: Step, student: RefoldForCausalLM) -> dict[int, int]:
    """Returns the teacher's layer for each depth of the student, without depths that have no such layer."""
    teacher = teacher_of(step)
    layers = {source: layer for layer, source in reversed(list(enumerate(teacher.source_layers)))}
    sources = source_layers(student)
    return {depth: layers[source] for depth, source in enumerate(sources) if source in layers}


def teacher_of(step: Step) -> Activations:
    """Returns the teacher's activations, which must exist."""
    assert step.teacher is not None
    return step.teacher


def distance(
    student: Float[Tensor, "B T D"],
    target: Float[Tensor, "B T D"],
    index: Int64[Tensor, "K"] | None,
    kind: str,
) -> Float[Tensor, ""]:
    """Returns the sum of distances over scored positions, in float32 or float64.

    `mse`: `|s - t|^2 / |t|^2`, the mean square of the difference divided by the mean square of the target; `l2`:
    `|s - t| / sqrt(D)` (RADLADS, arXiv 2505.03005, stage 1).

    Args:
        student: activations of the student, s.
        target: activations of the teacher, t.
        index: flat index of the scored positions, None for all.
        kind: `mse` or `l2`.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    ours, theirs = (_rows(states, index).to(dtype) for states in (student, target))
    if kind == "l2":
        return torch.linalg.vector_norm(ours - theirs, dim=-1).sum() / ours.shape[-1] ** 0.5
    size = theirs.square().mean(-1).clamp_min(SMALLEST_MEAN_SQUARE)
    return ((ours - theirs).square().mean(-1) / size).sum()


def _rows(states: Tensor, index: Tensor | None) -> Tensor:
    flat = states.reshape(-1, states.shape[-1])
    return flat if index is None else flat.index_select(0, index)
