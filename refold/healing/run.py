"""One healing run: trains its stages in order, and resumes from the last checkpoint."""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refold.checkpoint.atomic_file import write_json
from refold.errors import HealError
from refold.healing import training_state
from refold.healing.checkpoints import Checkpoints, RunState
from refold.healing.choices import Choices
from refold.healing.defaults import describe_stage
from refold.healing.distance import MEASURED_TOKENS, Distance, measure_distance
from refold.healing.log import LOG_NAME, Display, StepRecord, Trackers, TrainLog, read_log, require_trackers
from refold.healing.loop import Loop
from refold.healing.optimizer import make_optimizers
from refold.healing.precision import attend_in_float32
from refold.healing.prepared import PreparedRun, PreparedStage
from refold.healing.student import TrainingModel, check_objectives
from refold.healing.sweep import FACTORS, Trial, try_rates
from refold.healing.teachers import Teachers, TrainTeacher
from refold.healing.team import ShardedTeam, Team
from refold.healing.thaw import ThawRule
from refold.recipe.heal import HealStage

CHECKPOINT_SECONDS = 300.0
MEASUREMENTS = 10
"""Number of measurements of the held-out text in each stage."""
START_NAME = "start.json"
CHECKPOINTS_NAME = "checkpoints"


@dataclass(frozen=True)
class HealOptions:
    """Options of a run that do not change its result, except `sweep`.

    Attributes:
        device: device for training; None: `choose_device()`.
        overwrite: replace a folder that refold wrote.
        restart: drop an unfinished run instead of resuming it.
        checkpoint_seconds: time between two checkpoints.
        sweep: before each stage, try a third, one and three times its learning rate on a few steps, and use the best.
        sharded: divide the weights among the processes (FSDP2) instead of copying them.
        report_to: names of trackers: `tensorboard`, `wandb`, `trackio`.
        command: command line, recorded in the provenance.
        on_step: called with the record of every step.
        quiet: show no progress on stderr.
    """

    device: str | None = None
    overwrite: bool = False
    restart: bool = False
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    sweep: bool = False
    sharded: bool = False
    report_to: tuple[str, ...] = ()
    command: str = ""
    on_step: Callable[[StepRecord], None] | None = None
    quiet: bool = False


class Run:
    """Trains a loaded student through all stages of `heal`.

    Args:
        prepared: stages, teacher and held-out text.
        student: model with float32 weights, on the team's device.
        work: work folder, for checkpoints and log.
        destination: folder of the result; its name becomes the name of the run.
        team: the processes of the run.
        options: device, checkpoints, trackers and display.
        train_teacher: trains a teacher if a stage has `teacher_tokens`.

    Attributes:
        state: progress of the run.
        resumed_from: step of the checkpoint from which the run resumed, None if it did not resume.
        done: the trained stages, with their chosen learning rates.
        settings: a line for each stage that has a learning rate, by index of the stage.
        weights: the trained weights, not sharded; set when `train` returns.
    """

    def __init__(
        self,
        prepared: PreparedRun,
        student: Any,
        work: Path,
        destination: Path,
        team: Team,
        options: HealOptions,
        train_teacher: TrainTeacher,
    ):
        self.prepared, self.student, self.work, self.team, self.options = prepared, student, work, team, options
        self.state = RunState()
        self.resumed_from: int | None = None
        self.done: list[HealStage] = []
        self.settings: dict[int, str] = {}
        self.weights: dict[str, Tensor] = {}
        self._project = destination
        self._display = Display(prepared.tokens, options.quiet or not team.is_first)
        identity = {**prepared.identity, "sweep": options.sweep}
        self._checkpoints = Checkpoints(work / CHECKPOINTS_NAME, identity, self._display.tell)
        self._teachers = Teachers(prepared.teacher, prepared.kept, work, team, train_teacher, self._display.tell)
        self._training = TrainingModel(student)
        self._choices = Choices(work, team)

    def train(self) -> None:
        """Trains the remaining stages; errors as for `heal`."""
        with contextlib.ExitStack() as stack:
            # Dropout of a source draws from torch's global generators, whose state must not change for the caller.
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(self.prepared.stages[0].stage.seed)
            self.team.first(lambda: self._checkpoints.require_space(self._checkpoint_bytes()))
            tensors = self._resume()
            model = self.team.wrap(self._training)
            log = None
            if self.team.is_first:
                log = stack.enter_context(TrainLog(self.work / LOG_NAME, self.state.total_steps))
            trackers = Trackers(self.options.report_to, self._project, self._describe(), self.team)
            stack.callback(trackers.close)
            stack.enter_context(self._display)
            self._measure_start()
            for index, stage in enumerate(self.prepared.stages):
                stage = self._with_best_rate(index, self.with_rate(index, stage), model)
                self.done.append(stage.stage)
                if index < self.state.stage:
                    continue
                if not self.options.quiet:
                    self._display.tell(self.settings[index])
                if index > self.state.stage:
                    self._begin_stage()
                loop = self._loop(index, stage, model, self._checkpoints)
                if tensors is not None and self.state.step:
                    training_state.restore_optimizers(self.student, loop.optimizers, tensors, self.team)
                elif not self.state.step:
                    torch.manual_seed(stage.stage.seed)  # independent of earlier trials
                tensors = None
                self._display.start_at(loop.tokens_before + stage.schedule.tokens_after(self.state.step))
                loop.run(log, self._told(trackers))
                self.state = loop.state
            self.weights = {name: self.team.whole(value.detach()) for name, value in self.student.named_parameters()}

    def probe(self, stage: PreparedStage, num_steps: int) -> list[StepRecord]:
        """Runs a few steps of the first stage, whose learning rate is set, without a checkpoint."""
        records: list[StepRecord] = []
        model = self.team.wrap(self._training)
        self._loop(0, stage, model, None).run(None, records.append, num_steps)
        return records

    def with_rate(self, index: int, stage: PreparedStage, whole: HealStage | None = None) -> PreparedStage:
        """Returns a stage with a learning rate; if none is set, it is chosen by the distance from the teacher.

        Args:
            index: Index of the stage.
            stage: The stage. The student must have the initial weights of the stage, or the rate was chosen before.
            whole: Stage that is described to the user; None: the stage itself.
        """
        distance = None
        if stage.stage.learning_rate is None:
            width = self.student.config.hidden_size
            rate, distance = self._choices.learning_rate(index, width, partial(self._measure_distance, stage))
            stage = stage.at_rate(rate)
        whole = (whole or stage.stage).model_copy(update={"learning_rate": stage.stage.learning_rate})
        where = "" if len(self.prepared.stages) == 1 else f"stage {index + 1}: "
        self.settings[index] = where + describe_stage(whole, distance)
        return stage

    def _measure_distance(self, stage: PreparedStage) -> Distance | None:
        assert stage.stage.context is not None
        count = min(stage.schedule.num_sequences, max(1, MEASURED_TOKENS // stage.stage.context))
        batch = stage.data.batch(stage.schedule.first_sequence, count)
        teacher = self._teachers.load(stage) if stage.wants_teacher else None
        return measure_distance(self.student, teacher, batch, stage.autocast)

    def last_losses(self) -> dict[str, float]:
        """Returns `loss` and its parts over the last tenth of the last stage's steps."""
        lines = read_log(self.work / LOG_NAME)
        lines = [line for line in lines if line["stage"] == len(self.prepared.stages)]
        lines = [line for line in lines[-max(1, len(lines) // 10) :] if not line["skipped"]]
        known = set(StepRecord.__dataclass_fields__) - {"loss"}
        names = [name for name in lines[0] if name not in known] if lines else []
        return {name: sum(line[name] for line in lines) / len(lines) for name in names}

    def held_out(self) -> dict[int, float]:
        """Returns the bits per byte of the held-out text after each measured step; step 0: before training."""
        if self.prepared.held_out is None:
            return {}
        start = {0: json.loads((self.work / START_NAME).read_text())["held_out"]}
        lines = read_log(self.work / LOG_NAME)
        return start | {line["step"]: line["held_out"] for line in lines if "held_out" in line}

    def _resume(self) -> dict[str, Tensor] | None:
        try:
            self.team.first(self._checkpoints.claim)
        except HealError:
            # A mistake in the new settings is reported first: the unfinished run must not hide it.
            self._check_stages()
            raise
        self.team.first(self._checkpoints.newest)  # only one process repairs the folder after a kill
        found = self._checkpoints.load()
        if found is None:
            return None
        self.state, tensors = found
        self.resumed_from = self.state.total_steps
        training_state.restore_weights(self.student, tensors)
        self._display.tell(f"resumed at step {self.state.total_steps} of {self.prepared.num_steps}")
        return tensors

    def _checkpoint_bytes(self) -> int:
        """Returns the largest size of a checkpoint: float32 weights, and two moments of those that train."""
        sizes = {name: 4 * value.numel() for name, value in self.student.named_parameters()}
        trained = max(sum(sizes[name] for name in stage.trainable.trained) for stage in self.prepared.stages)
        return sum(sizes.values()) + 2 * trained

    def _check_stages(self) -> None:
        """Checks trackers, optimizers and objectives of all stages, as the stages do when they begin."""
        require_trackers(self.options.report_to)
        for stage in self.prepared.stages:
            self._require_optimizer(stage.stage)
            if stage.stage.teacher_tokens is None:
                check_objectives(stage.objectives, self.student, self._teachers.model(stage))

    def _require_optimizer(self, stage: HealStage) -> None:
        if stage.optimizer == "muon" and isinstance(self.team, ShardedTeam) and self.team.size > 1:
            raise HealError("optimizer: adamw is required where weights are spread over processes (got muon)")

    def _begin_stage(self) -> None:
        """Begins the next stage, and saves a checkpoint without optimizer state."""
        self.state = self.state.next_stage()
        tensors = training_state.collect(self.student, (), self.team)
        self.team.first(lambda: self._checkpoints.save(self.state, tensors))

    def _loop(self, index: int, stage: PreparedStage, model: Any, checkpoints: Checkpoints | None) -> Loop:
        spec, schedule = stage.stage, stage.schedule
        assert spec.micro_batch is not None
        self._require_optimizer(spec)
        check_objectives(stage.objectives, self.student, self._teachers.model(stage))
        teacher, stored = self._teachers.open(stage)
        if stage.autocast is not None and self.team.device.type == "cpu":
            attend_in_float32(self.student)
        _set_checkpointing(self.student, spec.gradient_checkpointing)
        self._training.begin(stage.objectives, stage.autocast)
        return Loop(
            team=self.team,
            model=model,
            student=self.student,
            teacher=teacher,
            stored=stored,
            optimizers=make_optimizers(self.student, spec, stage.trainable),
            trainable=stage.trainable,
            thaw=None if spec.thaw is None else ThawRule(spec.thaw, schedule.num_steps),
            schedule=schedule,
            data=stage.data,
            micro_batch=spec.micro_batch,
            gradient_clip=spec.gradient_clip,
            checkpoints=checkpoints,
            checkpoint_seconds=self.options.checkpoint_seconds,
            held_out=self._measure(stage) if checkpoints is not None else None,
            measure_every=-(-schedule.num_steps // MEASUREMENTS),
            tokens_before=self.prepared.tokens_before(index),
            state=self.state,
        )

    def _with_best_rate(self, index: int, stage: PreparedStage, model: Any) -> PreparedStage:
        """Returns a stage with the best learning rate of short trials if `sweep` is set, else the stage."""
        if not self.options.sweep:
            return stage
        path = self.work / f"sweep-{index + 1}.json"
        if not path.exists():
            middle = stage.stage.learning_rate
            assert middle is not None
            rates = [middle * factor for factor in FACTORS]
            self._display.tell(f"trying learning rates {', '.join(f'{rate:.2g}' for rate in rates)}")
            found = try_rates(rates, lambda rate: self._trial(index, stage.at_rate(rate), model), self.student)
            lines = [{"learning_rate": rate, "loss": loss} for rate, loss in found.items()]
            self.team.first(lambda: write_json(path, lines))
            self.team.wait()
        losses = {line["learning_rate"]: line["loss"] for line in json.loads(path.read_text())}
        best = min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)
        told = ", ".join(f"{rate:.2g}: {loss:.4f}" for rate, loss in losses.items())
        self._display.tell(f"learning rate {best:.2g} (loss at {told})")
        return stage.at_rate(best)

    def _trial(self, index: int, stage: PreparedStage, model: Any) -> Trial:
        loop = self._loop(index, stage, model, None)
        loop.state = RunState(stage=index)
        return loop

    def _told(self, trackers: Trackers) -> Callable[[StepRecord], None]:
        def tell(record: StepRecord) -> None:
            self._display.show(record)
            trackers.send(record)
            if self.options.on_step is not None:
                self.options.on_step(record)

        return tell

    def _measure(self, stage: PreparedStage) -> Callable[[], float] | None:
        held_out = self.prepared.held_out
        return None if held_out is None else lambda: held_out.measure(self.student, stage.autocast)

    def _measure_start(self) -> None:
        """Measures the held-out text before the first step, if this was not done before."""
        path = self.work / START_NAME
        measure = self._measure(self.prepared.stages[0])
        if measure is not None and not path.exists():
            value = measure()
            self.team.first(lambda: write_json(path, {"held_out": value}))

    def _describe(self) -> dict[str, Any]:
        """Returns the run's settings as plain data for trackers."""
        return {
            f"stage {index + 1} {key}": value if isinstance(value, (int, float)) else json.dumps(value)
            for index, each in enumerate(self.prepared.stages)
            for key, value in each.stage.model_dump(mode="json", exclude_none=True).items()
        }


def _set_checkpointing(student: Any, is_on: bool) -> None:
    if is_on == any(getattr(module, "gradient_checkpointing", False) for module in student.modules()):
        return
    # Newer versions of transformers use the name activation checkpointing.
    kind = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
    if is_on:
        getattr(student, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(student, f"{kind}_checkpointing_disable")()
