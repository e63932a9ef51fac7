"""The budget of a run of claims: trainings, tokens, and the time by a measured training step."""

from collections.abc import Sequence
from dataclasses import dataclass

from refold.claims.arm_maker import ArmRun
from refold.claims.arm_plan import ArmPlanner
from refold.claims.claim import ClaimArm
from refold.data.readers import DataSource
from refold.healing.probe import probe
from refold.progress import describe_duration
from refold.recipe.heal import HealStage

BACKWARD = 3.0
"""Forward passes that take as long as a forward and a backward pass."""
MEASUREMENTS = 10
"""Measurements of validation text during a training that is followed."""


@dataclass(frozen=True)
class ArmWork:
    """The work of one arm, in tokens of forward passes of the source.

    Attributes:
        num_trials: Learning rates tried.
        num_seeds: Trainings of full length.
        trial: Units of one trial.
        full: Units of one training of full length, or of one conversion.
        tokens: Training tokens of all of them.
    """

    num_trials: int
    num_seeds: int
    trial: float
    full: float
    tokens: int

    @classmethod
    def of(cls, arm: ClaimArm, planner: ArmPlanner, seeds: Sequence[int], text_tokens: int) -> "ArmWork":
        """Counts the work of an arm.

        Args:
            arm: The arm.
            planner: Plans of arms.
            seeds: Seeds for which the arm is made.
            text_tokens: Test tokens of all domains.
        """
        root = (*arm.bases, arm)[0]
        costs, context = planner.draft(root, seeds[0]).cost, planner.scale.context
        share = costs.target.flops(context) / costs.source.flops(context)
        step = BACKWARD * share + max((_teacher_passes(stage) for stage in arm.heal), default=0.0)
        validate = planner.scale.validation_documents * context * share
        measure = text_tokens * share + validate
        followed = MEASUREMENTS * validate if arm.is_followed else 0.0
        # A conversion that reads text runs the source over it.
        convert = 2.0 * planner.scale.calibration_tokens if not arm.bases else 0.0
        rates = len(planner.rates(arm)) if arm.heal else 0
        tokens, trial = planner.tokens(arm), planner.sweep_tokens(arm)
        return cls(
            rates,
            len(seeds),
            trial * step + validate,
            tokens * step + measure + followed + convert,
            rates * trial + len(seeds) * tokens,
        )

    @property
    def num_runs(self) -> int:
        """Trials and trainings of full length."""
        return self.num_trials + self.num_seeds

    @property
    def units(self) -> float:
        """Units of all runs."""
        return self.num_trials * self.trial + self.num_seeds * self.full

    def units_of(self, run: ArmRun) -> float:
        """Returns the units of one run."""
        return self.trial if run.is_trial else self.full


def _teacher_passes(stage: object) -> float:
    """Returns 1 for a stage whose objective reads the source's predictions, and 0 for one that does not."""
    assert isinstance(stage, dict)
    chosen = HealStage.model_validate({"objective": stage["objective"], "tokens": 1}).objective.chosen()
    return 0.0 if set(chosen) <= {"next_token", "exits"} else 1.0


@dataclass(frozen=True)
class ClaimsForecast:
    """The budget of a run.

    Attributes:
        num_claims: Claims that are run.
        num_arms: Different models.
        num_runs: Trainings, or conversions that are only measured.
        tokens: Training tokens of all of them.
        seconds_per_unit: Measured seconds of a forward pass of the source over one token.
        hours: Time of all runs, those of earlier calls included.
    """

    num_claims: int
    num_arms: int
    num_runs: int
    tokens: int
    seconds_per_unit: float
    hours: float

    @property
    def line(self) -> str:
        """The budget in one line."""
        return (
            f"budget: {self.num_claims} claims, {self.num_arms} models, {self.num_runs} trainings and measurements, "
            f"{self.tokens:,} training tokens; about {describe_duration(self.hours)} by a measured step (what an "
            f"earlier call finished is taken over)"
        )


def forecast_claims(
    num_claims: int, works: Sequence[ArmWork], planner: ArmPlanner, train: DataSource, device: str | None
) -> ClaimsForecast:
    """Measures a few training steps of the source, and forecasts a run by them."""
    scale = planner.scale
    stage = HealStage.model_validate(
        {
            "objective": "next_token",
            "tokens": 10 * scale.batch_tokens,
            "batch_tokens": scale.batch_tokens,
            "context": scale.context,
            "learning_rate": 1e-4,
        }
    )
    speed = probe(planner.model.source, train, stage, device=device, quiet=True).tokens_per_second
    per_unit = 1 / (BACKWARD * speed)
    return ClaimsForecast(
        num_claims=num_claims,
        num_arms=len(works),
        num_runs=sum(work.num_runs for work in works),
        tokens=sum(work.tokens for work in works),
        seconds_per_unit=per_unit,
        hours=sum(work.units for work in works) * per_unit / 3600,
    )
