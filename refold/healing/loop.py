"""The training loop of one stage."""

import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from refold.data.packing import IGNORED, PackedSequence, Sequences
from refold.errors import HealError
from refold.healing import training_state
from refold.healing.checkpoints import Checkpoints, RunState
from refold.healing.groups import Trainable
from refold.healing.interruption import HealInterrupted, SignalWatch
from refold.healing.log import StepRecord, TrainLog
from refold.healing.optimizer import freeze, set_rates
from refold.healing.schedule import Schedule
from refold.healing.student import Teacher
from refold.healing.team import ShardedTeam, Team
from refold.healing.thaw import ThawRule
from refold.scoring.stored import StoredPredictions

MAX_BAD_STEPS = 3
"""Number of successive steps without a finite loss and gradient that ends a run."""


@runtime_checkable
class StoredTeacher(Protocol):
    """The teacher's predictions on disk, with the positions of the data."""

    def read(self, position: int, count: int, /) -> StoredPredictions:
        """Returns the predictions of the sequences at `position .. position + count - 1`."""
        ...


@dataclass
class Loop:
    """Trains one stage.

    Attributes:
        team: the processes that train together.
        model: student and losses, wrapped by the team.
        student: the student inside `model`.
        teacher: the teacher in memory; None if no objective needs it.
        stored: the teacher's stored predictions; None if no objective reads them.
        optimizers: optimizers over all weights of `trainable`.
        trainable: the weights that train at some time of the stage.
        thaw: rule that thaws frozen weights; None: no weight is frozen at first.
        schedule: sequences and learning rate of each step.
        data: the sequences.
        micro_batch: sequences of one forward pass.
        gradient_clip: largest norm of the gradient.
        checkpoints: writes the checkpoints; None: no checkpoint is written.
        checkpoint_seconds: time between two checkpoints.
        held_out: measures bits per byte of the held-out text; None: there is no such text.
        measure_every: steps between two measurements of the held-out text.
        tokens_before: training tokens of earlier stages.
        state: progress of the run; `run` updates it.
    """

    team: Team
    model: nn.Module
    student: nn.Module
    teacher: Teacher | None
    stored: StoredTeacher | None
    optimizers: Sequence[torch.optim.Optimizer]
    trainable: Trainable
    thaw: ThawRule | None
    schedule: Schedule
    data: Sequences
    micro_batch: int
    gradient_clip: float
    checkpoints: Checkpoints | None
    checkpoint_seconds: float
    held_out: Callable[[], float] | None
    measure_every: int
    tokens_before: int
    state: RunState

    def run(self, log: TrainLog | None, on_step: Callable[[StepRecord], None], last_step: int | None = None) -> None:
        """Trains to the end of the schedule, or to `last_step`, and writes a checkpoint there.

        Raises:
            HealInterrupted: SIGTERM, SIGINT or SIGHUP came; a checkpoint was written.
            HealError: loss or gradient were not finite in several successive steps, memory ran out, or a process ended.
            FolderError: a checkpoint could not be written.
        """
        end = self.schedule.num_steps if last_step is None else min(last_step, self.schedule.num_steps)
        saved, saved_at = self.state.step, time.monotonic()
        self.model.train()
        with SignalWatch() as signals:
            while self.state.step < end:
                record = self._step_within_memory()
                if log is not None:
                    log.write(record)
                on_step(record)
                if self.state.bad_steps >= MAX_BAD_STEPS:
                    raise self._diverged()
                is_due = self.team.is_first and time.monotonic() - saved_at >= self.checkpoint_seconds
                # No checkpoint is written after a bad step, because a later run would resume from it.
                is_due = is_due and not self.state.bad_steps
                # Signals and clocks differ between processes, so all processes use the sum.
                interrupted, due = self.team.sum([float(signals.received is not None), float(is_due)])
                if due or interrupted:
                    self._save(log)
                    saved, saved_at = self.state.step, time.monotonic()
                if interrupted:
                    raise HealInterrupted(self._interrupted(), signals.received or signal.SIGTERM)
            if saved != self.state.step:
                self._save(log)

    def step(self) -> StepRecord:
        """Runs one optimizer step."""
        start = time.monotonic()
        state, step = self.state, self.state.step
        is_thawed = self.thaw is None or state.thaw.thawed_at is not None
        freeze(self.student, self.trainable, is_thawed or isinstance(self.team, ShardedTeam))
        rate = self.schedule.learning_rate(step)
        set_rates(self.optimizers, rate, 1.0 if self.thaw is None else self.thaw.factor(state.thaw, step))
        losses = self._backward(self.schedule.sequences(step))
        training = self._training(is_thawed)
        self.team.sum_gradients(training)
        norm = self.team.clip(training, self.gradient_clip)
        is_finite = math.isfinite(losses["loss"]) and math.isfinite(norm)
        if is_finite:
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        thaw = state.thaw
        if self.thaw is not None:
            size = self._weight_norm(training) if self.thaw.wants_norm(step + 1) else None
            thaw = self.thaw.after(thaw, step + 1, losses["loss"] if is_finite else math.nan, size)
        seconds = time.monotonic() - start
        self.state = replace(
            state,
            step=step + 1,
            bad_steps=0 if is_finite else state.bad_steps + 1,
            skipped_steps=state.skipped_steps + (not is_finite),
            seconds=state.seconds + seconds,
            thaw=thaw,
        )
        seen = self.schedule.tokens_after(step + 1)
        return StepRecord(
            step=self.state.total_steps,
            stage=state.stage + 1,
            tokens=self.tokens_before + seen,
            loss=losses.pop("loss"),
            objectives=losses,
            learning_rate=rate,
            grad_norm=norm,
            tokens_per_second=(seen - self.schedule.tokens_after(step)) / max(seconds, 1e-9),
            skipped=not is_finite,
            frozen=None if self.thaw is None else thaw.thawed_at is None,
            held_out=self._measure(step + 1),
        )

    def _step_within_memory(self) -> StepRecord:
        try:
            return self.step()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._out_of_memory(error) from error
        except RuntimeError as error:
            # PyTorch's CPU allocator raises a plain RuntimeError.
            if "can't allocate memory" in str(error) or "not enough memory" in str(error):
                raise self._out_of_memory(error) from error
            raise

    def _out_of_memory(self, error: Exception) -> HealError:
        smaller = f"micro_batch below {self.micro_batch}" if self.micro_batch > 1 else "a smaller context"
        return HealError(
            f"heal: enough memory for a forward and backward pass over {self.micro_batch} sequences is required "
            f"({str(error).splitlines()[0][:120]}); {self._kept()}; set {smaller}, or gradient_checkpointing"
        )

    def _backward(self, positions: range) -> dict[str, float]:
        """Sums the gradients of this process's micro-batches; returns `loss` and its parts over all processes."""
        mine = self.team.share(len(positions))
        first = positions.start + mine.start
        batch = self.data.batch(first, len(mine)) if len(mine) else None
        stored = None if self.stored is None or batch is None else self.stored.read(first, len(mine))
        scored = 0 if batch is None else int((batch.labels != IGNORED).sum())
        num_tokens = round(self.team.sum([float(scored)])[0])
        sums: dict[str, Tensor] = {}
        for start in range(0, self.team.largest_share(len(positions)), self.micro_batch):
            rows = slice(start, start + self.micro_batch)
            found = self._forward(batch, rows, positions, stored, num_tokens)
            found.total.backward()
            for name, value in {"loss": found.total.detach(), **found.means}.items():
                sums[name] = sums[name] + value if name in sums else value
        return self.team.sum_named({name: float(value) for name, value in sums.items()})

    def _forward(
        self,
        batch: PackedSequence | None,
        rows: slice,
        positions: range,
        stored: StoredPredictions | None,
        num_tokens: int,
    ) -> Any:
        if batch is None or rows.start >= len(batch.labels):
            # Another process has one more pass, and passes are collective: this process runs a pass without labels.
            batch, rows = self.data.batch(positions.start, 1), slice(0, 1)
            batch = batch._replace(labels=torch.full_like(batch.labels, IGNORED))
            stored = None if self.stored is None else self.stored.read(positions.start, 1)
        device = self.team.device
        input_ids, position_ids, labels = (part[rows].to(device, non_blocking=True) for part in batch)
        teacher = None if self.teacher is None else self.teacher.observe(input_ids, position_ids)
        if stored is not None:
            stored = StoredPredictions(*(part[rows].to(device, non_blocking=True) for part in stored))
        # Each micro-batch is divided by the token count of the whole step, so losses and gradients add up.
        return self.model(input_ids, position_ids, labels, teacher, num_tokens, stored)

    def _training(self, is_thawed: bool) -> list[nn.Parameter]:
        """Returns the weights that train now, and removes the gradients of weights that are still frozen."""
        training = []
        for name, parameter in self.student.named_parameters():
            if name not in self.trainable.trained:
                continue
            if is_thawed or name not in self.trainable.frozen_first:
                training.append(parameter)
            else:
                parameter.grad = None
        return training

    def _weight_norm(self, parameters: Sequence[nn.Parameter]) -> float:
        squares = sum(float(self.team.whole(value.detach()).float().square().sum()) for value in parameters)
        return math.sqrt(squares)

    def _measure(self, step: int) -> float | None:
        if self.held_out is None or (step % self.measure_every and step != self.schedule.num_steps):
            return None
        return self.held_out()

    def _save(self, log: TrainLog | None) -> None:
        if self.checkpoints is None:
            return
        if log is not None:
            log.sync()
        tensors = training_state.collect(self.student, self.optimizers, self.team)
        checkpoints = self.checkpoints
        self.team.first(lambda: checkpoints.save(self.state, tensors))

    def _interrupted(self) -> str:
        if self.checkpoints is None:
            return "heal: interrupted during a trial, which begins anew"
        end = self.state.steps_before + self.schedule.num_steps
        return f"heal: interrupted after step {self.state.total_steps} of {end}, which is saved"

    def _kept(self) -> str:
        last = None if self.checkpoints is None else self.checkpoints.newest_good()
        return f"the last good checkpoint is {last}" if last is not None else "there is no checkpoint yet"

    def _diverged(self) -> HealError:
        return HealError(
            f"heal: a finite loss and gradient are required (neither in {self.state.bad_steps} steps in a row, up to "
            f"step {self.state.total_steps}; {self._kept()}); lower learning_rate or look at the data there"
        )
