"""The budget of a run of claims: trainings, tokens, and the time by a measured training step and reading."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from refold.claims.arm_maker import ArmMaker, ArmRun
from refold.claims.arm_plan import ArmPlanner
from refold.claims.claim import ClaimArm
from refold.evaluation.subject import open_subject
from refold.healing.probe import probe
from refold.progress import Report, describe_duration
from refold.recipe.heal import HealStage

BACKWARD = 3.0
"""Forward passes that take as long as a forward and a backward pass."""
MEASUREMENTS = 10
"""Measurements of validation text during a training that is followed."""


@dataclass(frozen=True)
class Pace:
    """Measured times of the source.

    Attributes:
        train: Seconds of a forward pass over one token of a training step; the backward pass is `BACKWARD - 1` of them.
        read: Seconds of an evaluated token. Evaluation may have another dtype, and has no optimizer.
    """

    train: float
    read: float


@dataclass(frozen=True)
class ArmWork:
    """The work of one arm.

    Attributes:
        num_trials: Learning rates tried.
        num_seeds: Trainings of full length.
        trial: Expected seconds of one trial.
        full: Expected seconds of one training of full length, or of one conversion, with its measurement.
        tokens: Training tokens of all of them.
    """

    num_trials: int
    num_seeds: int
    trial: float
    full: float
    tokens: int

    @classmethod
    def of(cls, arm: ClaimArm, planner: ArmPlanner, pace: Pace, text_tokens: int) -> "ArmWork":
        """Counts the work of an arm.

        Args:
            arm: The arm.
            planner: Plans of arms.
            pace: Times of the source.
            text_tokens: Test tokens of all domains.
        """
        seeds = planner.seeds(arm)
        root = (*arm.bases, arm)[0]
        costs, context = planner.draft(root, seeds[0]).cost, planner.scale.context
        share = costs.target.flops(context) / costs.source.flops(context)
        step = BACKWARD * share + max((_teacher_passes(stage) for stage in arm.heal), default=0.0)
        validate = planner.scale.validation_documents * context * share
        followed = MEASUREMENTS * validate if arm.is_followed else 0.0
        # A conversion that reads text runs the source over it.
        convert = 2.0 * planner.scale.calibration_tokens if not arm.bases else 0.0
        rates = len(planner.rates(arm)) if arm.heal else 0
        tokens, trial = planner.tokens(arm), planner.sweep_tokens(arm)
        return cls(
            rates,
            len(seeds),
            trial * step * pace.train + validate * pace.read,
            tokens * step * pace.train + (text_tokens * share + validate + followed + convert) * pace.read,
            rates * trial + len(seeds) * tokens,
        )

    @property
    def num_runs(self) -> int:
        """Trials and trainings of full length."""
        return self.num_trials + self.num_seeds

    @property
    def seconds(self) -> float:
        """Expected seconds of all runs."""
        return self.num_trials * self.trial + self.num_seeds * self.full

    def seconds_of(self, run: ArmRun) -> float:
        """Returns the expected seconds of one run."""
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
        hours: Time of all runs, those of earlier calls included.
    """

    num_claims: int
    num_arms: int
    num_runs: int
    tokens: int
    hours: float

    @property
    def line(self) -> str:
        """The budget in one line."""
        return (
            f"budget: {self.num_claims} claims, {self.num_arms} models, {self.num_runs} trainings and measurements, "
            f"{self.tokens:,} training tokens; about {describe_duration(self.hours)} by a measured step and "
            f"reading (what an earlier call finished is taken over)"
        )


def measure_pace(maker: ArmMaker, device: str | None, report: Report) -> Pace:
    """Measures a few training steps of the source, and a reading of the validation text."""
    scale, source = maker.planner.scale, maker.planner.model.source
    stage = HealStage.model_validate(
        {
            "objective": "next_token",
            "tokens": 10 * scale.batch_tokens,
            "batch_tokens": scale.batch_tokens,
            "context": scale.context,
            "learning_rate": 1e-4,
        }
    )
    speed = probe(source, maker.texts.train, stage, device=device, quiet=True).tokens_per_second
    subject, validation = open_subject(source, device=device), maker.texts.validation
    seconds = []
    for done in range(1, 3):
        report(done, 3)
        started = time.perf_counter()
        maker.bits(subject, validation)
        seconds.append(time.perf_counter() - started)
    report(3, 3)
    # The first reading also allocates memory.
    return Pace(1 / (BACKWARD * speed), min(seconds) / validation.documents.num_tokens)


def forecast_claims(num_claims: int, works: Sequence[ArmWork]) -> ClaimsForecast:
    """Forecasts a run by the work of its arms."""
    return ClaimsForecast(
        num_claims=num_claims,
        num_arms=len(works),
        num_runs=sum(work.num_runs for work in works),
        tokens=sum(work.tokens for work in works),
        hours=sum(work.seconds for work in works) / 3600,
    )
