"""What a healing stage can minimise: the options of each objective, under the name a recipe gives it."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializeAsAny,
    field_validator,
    model_serializer,
    model_validator,
)

from refold.fields import Count, Real, Section

LossWeight = Annotated[Real, Field(ge=0)]
AlignmentInputs = Literal["teacher", "student"]


class ObjectiveOptions(Section):
    """Options that every objective has."""

    weight: LossWeight = 1.0
    """Factor in the stage's loss, which is the sum over its objectives."""


class NextTokenOptions(ObjectiveOptions):
    """Cross-entropy with the next token: what the source was trained with."""


class DistilOptions(ObjectiveOptions):
    """Cross-entropy with the text, and a divergence from the teacher's next-token distribution."""

    cross_entropy: LossWeight = 0.5
    """Weight of the cross-entropy."""
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"] = "forward_kl"
    """How far the student's distribution is from the teacher's. `forward_kl` is what RRT settles on."""
    divergence_weight: LossWeight = 0.5
    """Weight of the divergence."""
    temperature: Annotated[Real, Field(gt=0)] = 1.0
    """Temperature of both distributions in the divergence, which is multiplied by its square."""
    top_k: Count | None = None
    """Store the teacher's k likeliest tokens of every position once, with one bucket for all others, and learn from
    those: no teacher in memory. Left out: the teacher runs along. Only with `forward_kl`."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> "DistilOptions":
        if self.cross_entropy + self.divergence_weight == 0:
            raise ValueError("cross_entropy and divergence_weight: at least one above 0 is required (got 0 and 0)")
        if self.top_k is not None and self.divergence != "forward_kl":
            raise ValueError(f"top_k: requires divergence forward_kl (got {self.divergence})")
        if self.top_k is not None and self.temperature != 1:
            raise ValueError(f"top_k: requires temperature 1 (got {self.temperature:g})")
        return self


class AlignmentOptions(ObjectiveOptions):
    """Options of objectives that compare activations of student and teacher, depth by depth."""

    inputs: AlignmentInputs = "teacher"
    """What each depth reads: the `teacher`'s activations, so that depths learn side by side, or the `student`'s own."""
    loss: Literal["mse", "l2"] = "mse"
    """`mse`: mean square of each token's difference, relative to the mean square of what it is compared with; `l2`:
    length of that difference, by the square root of the width (RADLADS)."""


class MixerOutputsOptions(AlignmentOptions):
    """What each token mixer adds to the stream, compared with what the teacher's layer adds there."""


class HiddenStatesOptions(AlignmentOptions):
    """The stream after each depth, compared with the teacher's where the next depth begins."""


class AttentionMatricesOptions(ObjectiveOptions):
    """The token-mixing matrix of each mixer, compared with the teacher's attention matrix; mixers must be able to write
    theirs down."""


class ExitsOptions(ObjectiveOptions):
    """Cross-entropy at full depth, and at each early exit a loss towards the full depth's output."""

    cross_entropy: LossWeight = 1.0
    """Weight of the cross-entropy at full depth; 0 where another objective trains that."""
    weights: Literal["aggressive", "weighted"] = "aggressive"
    """Of the exits: all have `coefficient` (`aggressive`, RRT's choice), or the i-th of n outputs, the full depth
    included, has i divided by the sum of 1 to n (`weighted`)."""
    coefficient: LossWeight = 0.1
    """Of each exit where `weights` is aggressive."""
    target: Literal["final", "labels"] = "final"
    """What exits learn: the full depth's distribution, without gradient (forward KL), or the text (cross-entropy)."""
    gate_weight: LossWeight = 1.0
    """Weight of the gates' binary cross-entropy, where exits have gates; it moves nothing but the gates."""

    @model_validator(mode="after")
    def _coefficient_is_used(self) -> "ExitsOptions":
        if self.weights == "weighted" and self.coefficient != type(self).model_fields["coefficient"].default:
            raise ValueError(f"coefficient: requires weights aggressive (got {self.coefficient:g} with weighted)")
        return self


REGISTERED: dict[str, type[ObjectiveOptions]] = {}
"""Options of objectives that `refold.register_objective` added in this process, by name."""


class StageObjectives(Section):
    """What a stage minimises: one key for each objective, the value holding its options."""

    next_token: NextTokenOptions | None = None
    """Cross-entropy with the next token."""
    distil: DistilOptions | None = None
    """Cross-entropy and a divergence from the teacher's distribution (arXiv 2410.20672, section 3.6)."""
    mixer_outputs: MixerOutputsOptions | None = None
    """What each mixer adds to the stream (LoLCATs, arXiv 2410.10254; RADLADS, arXiv 2505.03005)."""
    hidden_states: HiddenStatesOptions | None = None
    """The stream between depths (MOHAWK, arXiv 2408.10189, stage 2)."""
    attention_matrices: AttentionMatricesOptions | None = None
    """Token-mixing matrices (MOHAWK, arXiv 2408.10189, stage 1)."""
    exits: ExitsOptions | None = None
    """Early exits, towards the output at full depth (arXiv 2410.20672, section 3.7)."""

    registered: dict[str, SerializeAsAny[ObjectiveOptions]] = Field(default_factory=dict)
    """Objectives of your own, by their names in `refold.register_objective`; in Python alone, as `objective: name`."""

    @model_validator(mode="before")
    @classmethod
    def _gather_registered(cls, value: Any) -> Any:
        own = {name: value[name] for name in REGISTERED if name in value} if isinstance(value, dict) else {}
        if not own:
            return value
        kept = {name: options for name, options in value.items() if name not in own}
        return {**kept, "registered": {**kept.get("registered", {}), **own}}

    @field_validator("registered", mode="before")
    @classmethod
    def _read_registered(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        unknown = [name for name in value if name not in REGISTERED]
        if unknown:
            raise ValueError(
                f"a name given to refold.register_objective is required (got {unknown[0]}); register it in this "
                f"process first"
            )
        return {name: REGISTERED[name].model_validate(options or {}) for name, options in value.items()}

    @model_serializer(mode="wrap")
    def _write(self, write: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        # Without any, a stage is written as it was before there were registered ones: runs resume by that.
        found = write(self)
        return found if self.registered else {name: value for name, value in found.items() if name != "registered"}

    @model_validator(mode="after")
    def _at_least_one(self) -> "StageObjectives":
        if not self.chosen():
            built_in = [name for name in type(self).model_fields if name != "registered"]
            raise ValueError(f"at least one of {', '.join(built_in)} is required (got none)")
        return self

    def chosen(self) -> dict[str, ObjectiveOptions]:
        """Returns the objectives that are there, by name, in the order of the class."""
        found = {name: getattr(self, name) for name in type(self).model_fields if name != "registered"}
        return {name: options for name, options in found.items() if options is not None} | self.registered
