"""Healing: trains a model folder stage by stage into a new folder, and can resume after an interruption."""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refold.checkpoint import provenance
from refold.checkpoint.folder import AtomicFolder
from refold.checkpoint.locate import Source
from refold.checkpoint.writer import count_bytes
from refold.data.corpus import Data, describe_training, name_parts
from refold.errors import given_or_default
from refold.healing.choices import Choices
from refold.healing.log import LOG_NAME
from refold.healing.output import describe, tensor_specs, write_healed
from refold.healing.prepared import HeldOutData, prepare
from refold.healing.run import CHECKPOINTS_NAME, HealOptions, Run
from refold.healing.team import ShardedTeam, Team
from refold.modeling.load import choose_device, load_model, open_source
from refold.recipe.heal import HealStage


@dataclass(frozen=True)
class HealResult:
    """Holds the figures of a finished run.

    Attributes:
        folder: the new folder.
        tokens: training tokens of all stages.
        steps: optimizer steps, skipped steps included.
        losses: `loss` and its parts over the last tenth of the last stage's steps, nats per token.
        skipped_steps: steps whose loss or gradient was not finite; they changed no weight.
        seconds: training time, with the time before a resume.
        resumed_from: step of the checkpoint from which this call resumed, None if it did not resume.
        epochs: passes over the data of the last stage; None if the data has no end.
        held_out: step to bits per byte of the held-out text after this step; 0: before training.
        stages: the stages with all chosen settings.
        notes: lines about the data, such as the warning about a single kind of text.
    """

    folder: Path
    tokens: int
    steps: int
    losses: dict[str, float]
    skipped_steps: int
    seconds: float
    resumed_from: int | None
    epochs: float | None
    held_out: dict[int, float]
    stages: tuple[HealStage, ...]
    notes: tuple[str, ...] = ()

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Returns the peak learning rate of each stage: from the recipe, chosen, or the best of the sweep."""
        return tuple(stage.learning_rate for stage in self.stages if stage.learning_rate is not None)

    @property
    def figures(self) -> dict[str, Any]:
        """Returns all figures as plain data."""
        stages = [stage.model_dump(mode="json", exclude_none=True) for stage in self.stages]
        return {**vars(self), "folder": str(self.folder), "stages": stages, "line": self.line}

    @property
    def tokens_per_second(self) -> float:
        """Returns training tokens per second of training time."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def line(self) -> str:
        """Returns the report in one line."""
        change = ""
        if len(self.held_out) > 1:
            first, last = self.held_out[min(self.held_out)], self.held_out[max(self.held_out)]
            change = f"{first:.3f} -> {last:.3f} bits per byte, "
        return f"{self.folder.name}: {change}{self.tokens:,} tokens, {self.tokens_per_second:,.0f} tokens/s"


def heal(
    model: str | Path | Source,
    destination: str | Path,
    data: Data,
    stages: HealStage | Sequence[HealStage],
    *,
    held_out: HeldOutData | None = None,
    teacher: str | Path | Source | None = None,
    options: HealOptions | None = None,
) -> HealResult:
    """Trains a model, stage after stage, and writes it into a new folder.

    Weights are float32 during training, and are written in the dtypes of the original model. A run that ends early
    leaves the folder `.NAME.heal` beside the destination, and the same call resumes from it; on the same CPU the result
    has the same bits. Under torchrun all processes train one model together.

    Args:
        model: A folded model, or any source (then the result is that source, trained further).
        destination: The new folder. It appears only when it is complete.
        data: Text (see `refold.data.corpus`): files, folders, hub data sets, texts, data frames, generators; a weighted
            mixture of several kinds is recommended.
        stages: Objectives, budgets and settings of training.
        held_out: Text whose bits per byte are measured at intervals.
        teacher: The model that objectives learn from; None: the source of the folded model, or for a source a fixed
            copy of itself.
        options: Device, checkpoints, overwriting and display.

    Raises:
        SourceError: Model, teacher or tokenizer are missing or broken, or the vocabularies differ.
        DataError: The data cannot be read, or has tokens the model does not know.
        HealError: Training diverged, memory ran out, or there is an unfinished run with other settings.
        HealInterrupted: SIGTERM, SIGINT or SIGHUP came; a checkpoint was written.
        FolderError: The destination is taken, locked or cannot be written, or the disk is full.
    """
    options = given_or_default(options, HealOptions, "options")
    team = (ShardedTeam if options.sharded else Team)(choose_device(options.device))
    located, _ = open_source(model)
    student: Any = load_model(located, dtype="auto", device=team.device)
    specs = tensor_specs(student)
    given = (stages,) if isinstance(stages, HealStage) else tuple(stages)
    notes = describe_training(data, given[0].data) if given else ()
    with contextlib.ExitStack() as stack:
        folder = AtomicFolder(destination, options.overwrite, needed_bytes=count_bytes(specs))
        team.first(lambda: stack.enter_context(folder))
        # From here on the folder's lock is held, so no other process uses the work folder.
        work = folder.destination.parent / f".{folder.destination.name}.heal"
        is_new = options.restart or not work.exists()
        team.first(lambda: _make_work_folder(work, options.restart))
        if is_new and team.is_first:
            stack.callback(_drop_if_untouched, work)
        completed = Choices(work, team).complete(given, student.config.max_position_embeddings)
        prepared = prepare(located, student.float(), teacher, data, held_out, completed, work, team)

        for each in prepared.stages:
            stack.callback(each.data.close)

        def train_teacher(source: Source, target: Path, stage: HealStage) -> None:
            quiet = replace(options, sweep=False, report_to=(), on_step=None, overwrite=False, restart=False)
            heal(source, target, data, stage, options=quiet)

        run = Run(prepared, student, work, folder.destination, team, options, train_teacher)
        run.train()
        result = replace(_result(run, folder.destination), notes=notes)
        if team.is_first:
            lines = [_provenance(located, stage, data, options) for stage in run.done]
            facts = describe(run.done, result.losses)
            write_healed(folder, located, run.weights, specs, lines, facts, work / LOG_NAME)
    team.first(lambda: shutil.rmtree(work, ignore_errors=True))
    team.leave()
    return result


def _make_work_folder(work: Path, restart: bool) -> None:
    if restart:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(exist_ok=True)


def _drop_if_untouched(work: Path) -> None:
    """Removes the work folder if the run was refused or failed before its first step."""
    log = work / LOG_NAME
    if not (work / CHECKPOINTS_NAME).exists() and not (log.exists() and log.stat().st_size):
        shutil.rmtree(work, ignore_errors=True)


def _provenance(model: Source, stage: HealStage, data: Data, options: HealOptions) -> provenance.Stage:
    return provenance.Stage(
        stage="heal",
        source=provenance.describe_source(model),
        recipe=stage.model_dump(mode="json", exclude_none=True),
        seed=stage.seed,
        tokens=stage.tokens,
        text=name_parts(data, stage.data),
        command=options.command,
    )


def _result(run: Run, destination: Path) -> HealResult:
    last = run.prepared.stages[-1]
    per_epoch = last.data.tokens_per_epoch
    return HealResult(
        folder=destination,
        tokens=run.prepared.tokens,
        steps=run.prepared.num_steps,
        losses=run.last_losses(),
        skipped_steps=run.state.skipped_steps,
        seconds=run.state.seconds,
        resumed_from=run.resumed_from,
        epochs=None if per_epoch is None else last.stage.tokens / per_epoch,
        held_out=run.held_out(),
        stages=tuple(run.done),
    )
