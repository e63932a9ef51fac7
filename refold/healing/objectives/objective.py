"""What every healing objective offers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, TypeVar

from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from refold.healing.activations import Activations, Want
from refold.recipe.objectives import ObjectiveOptions
from refold.scoring.stored import StoredPredictions

OptionsType = TypeVar("OptionsType", bound=ObjectiveOptions)


@dataclass(frozen=True)
class Step:
    """One micro-batch as objectives see it.

    Attributes:
        model: the student.
        input_ids: tokens.
        position_ids: where they fall back, a new document begins.
        labels: the id each position predicts (already shifted), -100 for none.
        num_tokens: scored tokens of the whole optimizer step, over all micro-batches and processes: the denominator of
            every loss, so that losses and gradients add up.
        student: what objectives want of the student's own pass; None where none wants any.
        teacher: what objectives want of the teacher; None where none wants any.
        stored: the teacher's stored distribution at these positions; None where none is wanted.
    """

    model: PreTrainedModel
    input_ids: Int64[Tensor, "B T"]
    position_ids: Int64[Tensor, "B T"]
    labels: Int64[Tensor, "B T"]
    num_tokens: int
    student: Activations | None
    teacher: Activations | None
    stored: StoredPredictions | None = None


class Loss(NamedTuple):
    """A loss, and what is told of it.

    Attributes:
        total: what to call `backward` on; sums over the micro-batch's scored positions, divided by `num_tokens`.
        means: its parts by name, unweighted, without gradients, divided likewise.
    """

    total: Float[Tensor, ""]
    means: dict[str, Float[Tensor, ""]]


class Objective(ABC, Generic[OptionsType]):
    """A loss over one micro-batch, made from the options of a stage.

    The weight among those options is applied outside.

    Attributes:
        options: from the recipe.
        student_wants: what it reads of the student's own pass (`Step.student`); `predictions` for nothing but those,
            empty where the student's pass is not needed.
        teacher_wants: what it reads of the teacher's pass; empty: no teacher is loaded for it.
        stored_top_k: how many of the teacher's likeliest tokens it reads from disk; None: none.
    """

    student_wants: frozenset[Want] = frozenset()
    teacher_wants: frozenset[Want] = frozenset()
    stored_top_k: int | None = None
    needs_fold: ClassVar[bool] = False
    """Whether the student must be a folded model, because depths are run one by one or mapped to source layers."""
    teacher_attention: ClassVar[str | None] = None
    """The attention back-end (`attn_implementation`) the teacher must be loaded with; None: any."""

    def __init__(self, options: OptionsType):
        self.options = options

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Refuses models it cannot compare, before anything is trained.

        Raises:
            HealError: they do not fit, or nothing would be compared.
        """

    @abstractmethod
    def loss(self, step: Step) -> Loss:
        """Returns the loss of one micro-batch and its parts."""
