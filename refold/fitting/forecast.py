"""Forecast of a fit: its steps with their tokens and about their time; it writes no file."""

from collections.abc import Sequence

from refold.errors import HealError
from refold.fitting.budget import Budget
from refold.fitting.heal_finalists import healing_tokens
from refold.fitting.job import LOOK_SHARE, FitJob
from refold.fitting.look import blueprint_costs
from refold.fitting.report import CostFigures, FitReport
from refold.fitting.single_methods import SINGLE_METHODS
from refold.healing.defaults import complete_stage, describe_stage
from refold.healing.probe import probe
from refold.planning.build import identity_blueprint
from refold.recipe.stages import choose_stages
from refold.studies.baselines import whole_model_stages

FORWARD_SHARE, READINGS = 4, 2
"""Forward passes that take as long as one training step, and forward passes for each token that is scored."""
PROBED_TOKENS = 100_000
"""Tokens of the schedule whose first steps are timed, where nothing is healed."""


def forecast(job: FitJob, budgets: Sequence[Budget]) -> FitReport:
    """Forecasts a fit, with the speed of a few training steps of the source.

    Args:
        job: The checked fit.
        budgets: Its budgets; several for a sweep.
    """
    options = job.options
    num_singles = len(SINGLE_METHODS) if options.singles else 0
    look_tokens, report_tokens = options.eval_tokens // LOOK_SHARE, options.eval_tokens
    looks = options.looks_at_each(len(budgets))
    scored = len(budgets) * (looks * look_tokens + (2 + num_singles) * report_tokens)
    finalists, brief, healed = healing_tokens(options.tokens, looks) if options.tokens else (0, 0, 0)
    notes = [
        f"measuring: {options.calibration_tokens:,} tokens, forwards and backwards, once",
        f"looking: {looks} candidates{' for each budget' if len(budgets) > 1 else ''}, {look_tokens:,} tokens each",
        f"comparing: up to {num_singles} single methods, {report_tokens:,} tokens each",
    ]
    stages = choose_stages(tokens=options.tokens or PROBED_TOKENS)
    if options.tokens:
        told = f", after {finalists} candidates for {brief:,} tokens each" if brief else ""
        notes.append(f"healing: {options.tokens:,} tokens{told}: {healed:,} in all")
        positions = job.model.arch.max_position_embeddings
        notes.extend(describe_stage(complete_stage(stage, positions)) for stage in stages)
    seconds = {}
    try:
        found = probe(job.source, job.train, whole_model_stages(stages), device=options.device, quiet=True)
    except HealError as error:
        notes.append(f"time: unknown, because the source itself cannot be trained so ({error})")
    else:
        speed = found.tokens_per_second
        seconds = {
            "measuring": options.calibration_tokens / speed,
            "scoring": READINGS * scored / (FORWARD_SHARE * speed),
            **({"healing": healed / speed} if healed else {}),
        }
        notes.append(f"time: by {speed:,.0f} tokens/s of the source in training; converting comes on top")
    return FitReport(
        source=job.source.where,
        source_costs=CostFigures.of(blueprint_costs(identity_blueprint(job.model.arch), budgets[0].context)),
        text=job.texts(),
        context=budgets[0].context,
        engine=options.engine,
        seconds=seconds,
        is_forecast=True,
        notes=(*notes, *job.notes),
    )
