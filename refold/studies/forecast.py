"""Forecast of a run: its models, and the time of healing and evaluation."""

from dataclasses import dataclass

from refold.errors import HealError
from refold.healing.defaults import complete_stage, describe_stage
from refold.healing.probe import probe
from refold.progress import describe_duration
from refold.studies.baselines import BASELINES, whole_model_stages
from refold.studies.job import RunJob
from refold.studies.run import describe_size

FORWARD_SHARE = 4
"""Forward passes that take as long as one training step: three of the student, one of the teacher."""
READINGS = 2
"""Forward passes for each evaluated token: windows overlap by half."""


@dataclass(frozen=True)
class Forecast:
    """Holds the forecast of a run.

    Attributes:
        lines: Lines for the user.
        heal_hours: Hours to heal all arms; None: they could not be measured.
        evaluate_hours: Hours of all evaluations; None: they could not be measured.
    """

    lines: tuple[str, ...]
    heal_hours: float | None
    evaluate_hours: float | None

    @property
    def line(self) -> str:
        """Returns the forecast as text."""
        return "\n".join(self.lines)


def forecast(job: RunJob) -> Forecast:
    """Forecasts a run, with the speed of a few training steps of the source; it writes no file.

    Args:
        job: The checked run, from `read_job`.

    Raises:
        RefoldError: The errors of the run's first steps.
    """
    costs, tokens = job.plan.cost, job.settings.eval_tokens or 0
    healed = [name for name in job.baselines if BASELINES[name].scheme is None]
    lines = [
        f"folded by {job.name}: {describe_size(costs.target.weight_bytes / costs.source.weight_bytes)}",
        f"baselines: {', '.join(job.baselines) or 'none'}",
        f"evaluation: up to {tokens:,} held-out tokens for each model, unhealed and healed (--eval-tokens)",
    ]
    if not job.stages:
        lines.append("healing: none, so no time can be told")
        return Forecast(tuple(lines), None, None)
    # The source has no counterpart of the parts of a fold, so all weights train.
    stages = whole_model_stages(job.stages)
    try:
        found = probe(job.source, job.train, stages, device=job.settings.device, quiet=True)
    except HealError as error:
        lines.append(f"time: unknown, because the source itself cannot be trained so ({error})")
        return Forecast(tuple(lines), None, None)
    arms = 1 + len(healed)
    num_evaluations = 2 + len(job.baselines) + 1  # two of the folded model, one of the source
    positions = job.plan.blueprint.arch.max_position_embeddings
    heal_hours = found.hours * arms
    evaluate_hours = num_evaluations * READINGS * tokens / (FORWARD_SHARE * found.tokens_per_second) / 3600
    lines += [
        f"healing: {job.tokens:,} tokens for each of {arms} models ({', '.join(['folded', *healed])})",
        *(describe_stage(complete_stage(stage, positions)) for stage in job.stages),
        f"time: about {describe_duration(heal_hours)} of healing and {describe_duration(evaluate_hours)} of "
        f"evaluation, by {found.tokens_per_second:,.0f} tokens/s of the source in training; converting comes on top",
        *job.notes,
    ]
    return Forecast(tuple(lines), heal_hours, evaluate_hours)
