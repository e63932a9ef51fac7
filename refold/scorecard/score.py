"""Scorecards of models: every section that was asked for, with the reason where one could not run."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from refold.checkpoint.provenance import Stage
from refold.data.corpus import Data
from refold.data.readers import DataSource
from refold.errors import RefoldError, given_or_default
from refold.evaluation.evaluate import (
    describe_machine,
    evaluate_subject,
    open_evaluated_text,
    quantise_subject,
    require_quantisable,
)
from refold.evaluation.reference import REMEMBERED_BYTES, Reference
from refold.evaluation.result import Evaluation
from refold.evaluation.subject import open_subject
from refold.evaluation.window_pass import Stopwatch
from refold.modeling.load import ModelLike, open_source
from refold.progress import Show
from refold.scorecard.branches import measure_branches
from refold.scorecard.exit_choices import measure_exits
from refold.scorecard.job import ScoreJob, SectionNotRun
from refold.scorecard.noise import measure_noise
from refold.scorecard.recall.measure import measure_recall
from refold.scorecard.record import NotRun, Scorecard, SpeedSection
from refold.scorecard.settings import ScoreSettings
from refold.scorecard.speed import measure_speed
from refold.scorecard.tasks.measure import measure_tasks, require_tasks

SECTIONS: dict[str, Callable[[ScoreJob], Any]] = {
    "tasks": measure_tasks,
    "recall": measure_recall,
    "exits": measure_exits,
    "branches": measure_branches,
    "noise": measure_noise,
    "speed": measure_speed,
}
"""Sections beside text, by their field of `Scorecard` and of `ScoreSettings`."""


def score(
    models: Sequence[ModelLike],
    data: Data | None = None,
    settings: ScoreSettings | None = None,
    *,
    against: ModelLike | None = None,
    command: str = "",
    show: Show | None = None,
) -> list[Scorecard]:
    """Measures every section that was asked for, of one model after another.

    Args:
        models: Folders, hub ids or loaded models.
        data: Held-out text, as for `refold.evaluate`; None: no text, and no section that reads text.
        settings: Sections, amounts and seed.
        against: The source. Text is compared with it window by window, and speed is measured in turns with it. If a
            section beside text is asked for, the source gets a scorecard too, as the last one.
        command: Command line, recorded in the scorecards.
        show: Shows the progress.

    Raises:
        RefoldError: Nothing is asked for, or a model, text or task is missing or broken. A section that has no meaning
            for a model, such as exits of a model without exits, is listed in `not_run` instead.
    """
    return list(score_each(models, data, settings, against=against, command=command, show=show))


def score_each(
    models: Sequence[ModelLike],
    data: Data | None = None,
    settings: ScoreSettings | None = None,
    *,
    against: ModelLike | None = None,
    command: str = "",
    show: Show | None = None,
) -> Iterator[Scorecard]:
    """Yields the scorecards of `score` as they are done, so that a later failure loses none.

    One model at a time is in memory, and the source where it is compared with.
    """
    settings, show = given_or_default(settings, ScoreSettings, "settings"), show or Show()
    asked = _asked(settings)
    if data is None and not asked:
        flags = ", ".join(f"--{name}" for name in ("data", *SECTIONS))
        raise RefoldError(f"evaluate: a text or a section is required (got neither); give one of {flags}")
    if not models:
        raise RefoldError("evaluate: at least one model is required (got none); name its folder")
    source = None if data is None else open_evaluated_text(data, settings.text.max_tokens)
    for model in models if against is None else (*models, against):
        # A mistake in the last model is told before the first one takes an hour.
        if not isinstance(model, PreTrainedModel):
            open_source(model)
    if settings.tasks:
        require_tasks(settings)
    reference = None if against is None else _refer(against, models, settings)
    scoring = _Scoring(source, settings, reference, command, show)
    source_speed: SpeedSection | None = None
    for model in models:
        card = scoring.run(model, asked)
        if card.speed is not None and source_speed is None:
            source_speed = card.speed.against
        yield card
    if against is not None and scores_source(models, settings, against):
        yield _score_source(scoring, against, asked, source_speed)


def scores_source(models: Sequence[ModelLike], settings: ScoreSettings, against: ModelLike | None) -> bool:
    """Returns whether `score` makes a scorecard of the source too, after those of the models."""
    return against is not None and bool(_asked(settings)) and not any(_is_same(model, against) for model in models)


def _asked(settings: ScoreSettings) -> tuple[str, ...]:
    return tuple(name for name in SECTIONS if getattr(settings, name))


def _refer(against: ModelLike, models: Sequence[ModelLike], settings: ScoreSettings) -> Reference:
    first, device = models[0], settings.text.device
    if device is None and isinstance(first, PreTrainedModel):
        device = first.device
    remembered = REMEMBERED_BYTES if len(models) > 1 else 0
    return Reference(against, dtype=settings.text.dtype, device=device, remember=remembered)


def _score_source(
    scoring: "_Scoring", source: ModelLike, asked: Sequence[str], speed: SpeedSection | None
) -> Scorecard:
    """Measures the source as the models, except for its speed, which was measured in turns with a model."""
    text = replace(scoring.settings.text, quantise=None)
    alone = replace(scoring, settings=replace(scoring.settings, text=text), against=None)
    card = alone.run(source, tuple(name for name in asked if name != "speed" or speed is None))
    return card if speed is None else card.model_copy(update={"speed": speed})


@dataclass(frozen=True)
class _Scoring:
    """Inputs that all models share."""

    data: DataSource | None
    settings: ScoreSettings
    against: Reference | None
    command: str
    show: Show

    def run(self, model: ModelLike, asked: Sequence[str]) -> Scorecard:
        """Measures one model and frees it."""
        try:
            return self._measure(model, asked)
        finally:
            if self.against is not None:
                self.against.let_go()
            # Modules refer to each other in circles.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _measure(self, model: ModelLike, asked: Sequence[str]) -> Scorecard:
        text = self.settings.text
        require_quantisable(model, text.quantise)
        watch = Stopwatch()
        with watch.measure("load"):
            subject = open_subject(model, dtype=text.dtype, device=text.device)
        if text.quantise is not None:
            subject = quantise_subject(subject, text.quantise)
        job = ScoreJob(model, subject, self.data, self.against, self.settings, self.show)
        found: dict[str, Any] = {} if self.data is None else {"text": _score_text(job, self.data, watch)}
        missing = []
        for name in asked:
            try:
                found[name] = SECTIONS[name](job)
            except SectionNotRun as error:
                missing.append(NotRun(section=name, why=str(error)))
        stage = Stage(stage="evaluate")
        return Scorecard(
            model=subject.facts,
            **found,
            not_run=tuple(missing),
            settings=_plain(asdict(self.settings)),
            machine=describe_machine(subject.model.device),
            versions=stage.versions,
            command=self.command,
            time=stage.time,
        )


def _score_text(job: ScoreJob, data: DataSource, watch: Stopwatch) -> Evaluation:
    text, against = job.settings.text, job.against
    with job.show.progress(f"{job.subject.facts.name}: text", "windows") as report:
        return evaluate_subject(job.subject, data, text, against=against, progress=report, watch=watch)


def _is_same(model: ModelLike, other: ModelLike) -> bool:
    if isinstance(model, str | Path) and isinstance(other, str | Path):
        return str(model) == str(other) or Path(model).resolve() == Path(other).resolve()
    return model is other


def _plain(value: Any) -> Any:
    """Returns settings as JSON has them."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
