"""The objectives of a healing stage: one options class for each, under its name in a recipe."""

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
    """Weight in the stage's loss, which is the weighted sum of its objectives."""


class NextTokenOptions(ObjectiveOptions):
    """Cross-entropy with the next token: the objective that the source was trained with."""


class DistilOptions(ObjectiveOptions):
    """Cross-entropy with the next token, and a divergence from the teacher's next-token distribution."""

    cross_entropy: LossWeight = 0.5
    """Weight of the cross-entropy."""
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"] = "forward_kl"
    """Divergence between the student's and the teacher's distribution. RRT recommends `forward_kl`."""
    divergence_weight: LossWeight = 0.5
    """Weight of the divergence."""
    temperature: Annotated[Real, Field(gt=0)] = 1.0
    """Temperature of both distributions. The divergence is multiplied by the square of the temperature."""
    top_k: Count | None = None
    """Number k of the teacher's most likely tokens that are stored once for every position, with one bucket for all
    other tokens, so that the teacher is not in memory during training. Requires `forward_kl`. Default: the teacher runs
    in every training step."""

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
    """Options of objectives that compare activations of student and teacher at each depth."""

    inputs: AlignmentInputs = "teacher"
    """Input of each depth: the `teacher`'s activations, so that depths learn independently, or the `student`'s own."""
    loss: Literal["mse", "l2"] = "mse"
    """`mse`: mean square of each token's difference, divided by the mean square of the teacher's activation. `l2`:
    length of each token's difference, divided by the square root of the width (RADLADS)."""


class MixerOutputsOptions(AlignmentOptions):
    """Distance between the output of each token mixer and the output of the teacher's attention at the same depth."""


class HiddenStatesOptions(AlignmentOptions):
    """Distance between the residual streams of student and teacher after each depth."""


class AttentionMatricesOptions(ObjectiveOptions):
    """Distance between the token-mixing matrix of each mixer and the teacher's attention matrix. It requires mixers
    that can compute their matrix."""


class ExitsOptions(ObjectiveOptions):
    """Cross-entropy at full depth, and a loss at each early exit."""

    cross_entropy: LossWeight = 1.0
    """Weight of the cross-entropy at full depth; 0 if another objective trains the full depth."""
    weights: Literal["aggressive", "weighted"] = "aggressive"
    """Weights of the exits. `aggressive` (RRT's choice): `coefficient` for all. `weighted`: i divided by the sum of 1
    to n for the i-th of n outputs, the full depth included."""
    coefficient: LossWeight = 0.1
    """Weight of each exit if `weights` is `aggressive`."""
    target: Literal["final", "labels"] = "final"
    """Target of the exits: `final`: the distribution at full depth, without gradient (forward KL); `labels`: the next
    token (cross-entropy)."""
    gate_weight: LossWeight = 1.0
    """Weight of the binary cross-entropy of gates, if exits have gates. It trains only the gates."""

    @model_validator(mode="after")
    def _coefficient_is_used(self) -> "ExitsOptions":
        if self.weights == "weighted" and self.coefficient != type(self).model_fields["coefficient"].default:
            raise ValueError(f"coefficient: requires weights aggressive (got {self.coefficient:g} with weighted)")
        return self


REGISTERED: dict[str, type[ObjectiveOptions]] = {}
"""Options classes of objectives added by `refold.register_objective` in this process, by name."""


class StageObjectives(Section):
    """The objectives of a stage: one key for each, with its options as the value."""

    next_token: NextTokenOptions | None = None
    """Cross-entropy with the next token."""
    distil: DistilOptions | None = None
    """Cross-entropy and a divergence from the teacher's distribution (arXiv 2410.20672, section 3.6)."""
    mixer_outputs: MixerOutputsOptions | None = None
    """Outputs of the mixers (LoLCATs, arXiv 2410.10254; RADLADS, arXiv 2505.03005)."""
    hidden_states: HiddenStatesOptions | None = None
    """The residual stream between depths (MOHAWK, arXiv 2408.10189, stage 2)."""
    attention_matrices: AttentionMatricesOptions | None = None
    """Token-mixing matrices (MOHAWK, arXiv 2408.10189, stage 1)."""
    exits: ExitsOptions | None = None
    """Early exits (arXiv 2410.20672, section 3.7)."""

    registered: dict[str, SerializeAsAny[ObjectiveOptions]] = Field(default_factory=dict)
    """Objectives added by `refold.register_objective`, by name; available only in Python, as `objective: name`."""

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
                f"must be a name given to refold.register_objective (got {unknown[0]}); register it in this process "
                f"first"
            )
        return {name: REGISTERED[name].model_validate(options or {}) for name, options in value.items()}

    @model_serializer(mode="wrap")
    def _write(self, write: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        # An empty `registered` is not written, so that runs started by earlier versions can resume.
        found = write(self)
        return found if self.registered else {name: value for name, value in found.items() if name != "registered"}

    @model_validator(mode="after")
    def _at_least_one(self) -> "StageObjectives":
        if not self.chosen():
            built_in = [name for name in type(self).model_fields if name != "registered"]
            raise ValueError(f"at least one of {', '.join(built_in)} is required (got none)")
        return self

    def chosen(self) -> dict[str, ObjectiveOptions]:
        """Returns the chosen objectives by name, in the order of the class."""
        found = {name: getattr(self, name) for name in type(self).model_fields if name != "registered"}
        return {name: options for name, options in found.items() if options is not None} | self.registered
