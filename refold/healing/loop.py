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
"""Steps in a row without a finite loss and gradient after which a run ends."""


@runtime_checkable
class StoredTeacher(Protocol):
    """The teacher's predictions on disk, addressed as the data is."""

    def read(self, position: int, count: int, /) -> StoredPredictions:
        """Returns those of the sequences at `position .. position + count - 1`."""
        ...


@dataclass
class Loop:
    """Everything one stage trains with, and where it stands.

    Attributes:
        team: the processes that train together.
        model: student and losses, wrapped by the team.
        student: the student in it.
        teacher: None where no objective needs one that runs along.
        stored: the teacher's stored predictions; None where no objective reads them.
        optimizers: over the weights that train at some time.
        trainable: which those are.
        thaw: when frozen ones join in; None: nothing is frozen at first.
        schedule: which sequences and learning rate each step has.
        data: the sequences.
        micro_batch: sequences of one forward pass.
        gradient_clip: longest gradient.
        checkpoints: where they are kept; None: nowhere.
        checkpoint_seconds: time between two of them.
        held_out: measures bits per byte; None: there is no such text.
        measure_every: steps between two such measurements.
        tokens_before: training tokens of earlier stages.
        state: where the run stands; `run` moves it on.
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
        """Trains to the end of the schedule, or to a step of it, and writes a checkpoint there.

        Raises:
            HealInterrupted: SIGTERM, SIGINT or SIGHUP came; a checkpoint was written.
            HealError: loss or gradient were not finite several steps in a row, memory ran out, or a process is gone.
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
                # Between bad steps nothing is kept that a later run should begin with.
                is_due = is_due and not self.state.bad_steps
                # Signals and clocks differ between processes, so all of them go by the sum.
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
            # PyTorch's CPU allocator has no error type of its own.
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
        """Adds up the gradients of this process's micro-batches; returns `loss` and its parts over all processes."""
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
            # Another process has one pass more, and passes are collective: this one goes along without scoring.
            batch, rows = self.data.batch(positions.start, 1), slice(0, 1)
            batch = batch._replace(labels=torch.full_like(batch.labels, IGNORED))
            stored = None if self.stored is None else self.stored.read(positions.start, 1)
        device = self.team.device
        input_ids, position_ids, labels = (part[rows].to(device, non_blocking=True) for part in batch)
        teacher = None if self.teacher is None else self.teacher.observe(input_ids, position_ids)
        if stored is not None:
            stored = StoredPredictions(*(part[rows].to(device, non_blocking=True) for part in stored))
        # Every micro-batch is divided by the whole step's count, so their losses and gradients add up.
        return self.model(input_ids, position_ids, labels, teacher, num_tokens, stored)

    def _training(self, is_thawed: bool) -> list[nn.Parameter]:
        """The weights that train now; what waits frozen loses the gradients it may have got."""
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
