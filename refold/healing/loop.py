"""The training loop of one stage."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from refold.data.packing import IGNORED, PackedSequence, PackedSequences
from refold.errors import HealError
from refold.healing import training_state
from refold.healing.checkpoints import Checkpoints, RunState
from refold.healing.interruption import HealInterrupted, SignalWatch
from refold.healing.log import StepRecord, TrainLog
from refold.healing.schedule import Schedule
from refold.healing.student import Teacher, TrainingModel

MAX_BAD_STEPS = 3
"""Steps in a row without a finite loss and gradient after which a run ends."""


@dataclass
class Loop:
    """Everything one stage trains with, and where it stands.

    Attributes:
        accelerator: runs the backward pass and measures gradients.
        model: student and loss, prepared by the accelerator.
        teacher: None where the objective needs none.
        optimizer: over the model's parameters.
        schedule: which sequences and learning rate each step has.
        data: the sequences.
        micro_batch: sequences of one forward pass.
        gradient_clip: longest gradient.
        checkpoints: where they are kept.
        checkpoint_seconds: time between two of them.
        device: of the models.
        state: where the run stands; `run` moves it on.
    """

    accelerator: Accelerator
    model: TrainingModel
    teacher: Teacher | None
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    data: PackedSequences
    micro_batch: int
    gradient_clip: float
    checkpoints: Checkpoints
    checkpoint_seconds: float
    device: torch.device
    state: RunState

    def run(self, log: TrainLog, on_step: Callable[[StepRecord], None]) -> None:
        """Trains to the end of the schedule, and writes a checkpoint there.

        Raises:
            HealInterrupted: SIGTERM or SIGINT came; a checkpoint was written.
            HealError: loss or gradient were not finite several steps in a row.
            FolderError: a checkpoint could not be written.
        """
        saved, saved_at = self.state.step, time.monotonic()
        self.model.train()
        with SignalWatch() as signals:
            while self.state.step < self.schedule.num_steps:
                record = self.step()
                log.write(record)
                on_step(record)
                if self.state.bad_steps >= MAX_BAD_STEPS:
                    raise self._diverged()
                is_due = time.monotonic() - saved_at >= self.checkpoint_seconds
                if is_due or signals.received is not None:
                    self._save(log)
                    saved, saved_at = self.state.step, time.monotonic()
                if signals.received is not None:
                    raise HealInterrupted(
                        f"heal: interrupted after step {self.state.step} of {self.schedule.num_steps}, which is saved; "
                        f"give the same command again to go on",
                        signals.received,
                    )
            if saved != self.state.step:
                self._save(log)

    def step(self) -> StepRecord:
        """Runs one optimizer step."""
        start = time.monotonic()
        step = self.state.step
        positions = self.schedule.sequences(step)
        batch = self.data.batch(positions.start, len(positions))
        rate = self.schedule.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self._backward(batch)
        gradient: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), self.gradient_clip)
        norm = float(gradient)
        is_finite = math.isfinite(losses["loss"]) and math.isfinite(norm)
        if is_finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - start
        self.state = replace(
            self.state,
            step=step + 1,
            bad_steps=0 if is_finite else self.state.bad_steps + 1,
            skipped_steps=self.state.skipped_steps + (not is_finite),
            seconds=self.state.seconds + seconds,
        )
        seen = self.schedule.tokens_after(step + 1)
        return StepRecord(
            step=step + 1,
            tokens=seen,
            loss=losses.pop("loss"),
            objectives=losses,
            learning_rate=rate,
            grad_norm=norm,
            tokens_per_second=(seen - self.schedule.tokens_after(step)) / max(seconds, 1e-9),
            skipped=not is_finite,
        )

    def _backward(self, batch: PackedSequence) -> dict[str, float]:
        """Adds up the gradients of all micro-batches; returns the batch's `loss` and its parts."""
        num_tokens = int((batch.labels != IGNORED).sum())
        sums: dict[str, Tensor] = {}
        for first in range(0, len(batch.labels), self.micro_batch):
            rows = slice(first, first + self.micro_batch)
            input_ids, position_ids, labels = (part[rows].to(self.device, non_blocking=True) for part in batch)
            teacher = None if self.teacher is None else self.teacher.predict(input_ids, position_ids)
            # Every micro-batch is divided by the whole batch's count, so their losses and gradients add up.
            loss = self.model(input_ids, position_ids, labels, teacher, num_tokens)
            self.accelerator.backward(loss.total)
            for name, value in {"loss": loss.total.detach(), **loss.means}.items():
                sums[name] = sums[name] + value if name in sums else value
        return {name: float(value) for name, value in sums.items()}

    def _save(self, log: TrainLog) -> None:
        log.sync()
        model = self.accelerator.unwrap_model(self.model)
        self.checkpoints.save(self.state, training_state.collect(model.student, self.optimizer))

    def _diverged(self) -> HealError:
        last = self.checkpoints.newest()
        kept = f"the last good checkpoint is {last}" if last is not None else "there is no checkpoint yet"
        return HealError(
            f"heal: a finite loss and gradient are required (neither in {self.state.bad_steps} steps in a row, up to "
            f"step {self.state.step}; {kept}); lower learning_rate or look at the data there"
        )
