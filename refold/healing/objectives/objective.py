"""The base class of healing objectives, with the inputs and outputs of a loss."""

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
    """Holds one micro-batch with the activations that objectives read.

    Attributes:
        model: the student.
        input_ids: tokens.
        position_ids: a position that is lower than the one before begins a new document.
        labels: the id that each position predicts (already shifted); -100: the position is not scored.
        num_tokens: scored tokens of the whole optimizer step, over all micro-batches and processes: the denominator of
            every loss, so that losses and gradients of micro-batches can be summed.
        student: requested activations of the student's own pass; None if no objective requests any.
        teacher: requested activations of the teacher; None if no objective requests any.
        stored: the teacher's stored distribution at these positions; None if no objective reads it.
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
    """Holds a loss and its parts.

    Attributes:
        total: the loss for `backward`: the sum over the micro-batch's scored positions, divided by `num_tokens`.
        means: unweighted parts of the loss by name, without gradients, divided by `num_tokens` too.
    """

    total: Float[Tensor, ""]
    means: dict[str, Float[Tensor, ""]]


class Objective(ABC, Generic[OptionsType]):
    """Computes a loss over one micro-batch, with the options of a stage.

    The caller multiplies the loss by the option `weight`.

    Attributes:
        options: options from the recipe.
        student_wants: activations that it reads of the student's own pass (`Step.student`), for example `predictions`;
            empty: the student's pass is not needed.
        teacher_wants: activations that it reads of the teacher's pass; empty: it needs no teacher in memory.
        stored_top_k: number of the teacher's likeliest tokens that it reads from disk; None: it reads none.
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
        """Checks that the objective can compare two models, before training begins.

        Raises:
            HealError: the models do not fit, or no depth can be compared.
        """

    @abstractmethod
    def loss(self, step: Step) -> Loss:
        """Returns the loss of one micro-batch and its parts."""
