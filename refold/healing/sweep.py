"""A sweep over learning rates: short trials from the same weights on the same data."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from refold.errors import HealError
from refold.healing.interruption import HealInterrupted
from refold.healing.log import StepRecord
from refold.healing.schedule import Schedule

FACTORS = (1 / 3, 1.0, 3.0)
"""Factors on the stage's learning rate."""
SHARE = 0.05
"""Steps of each trial, as a share of the stage's steps."""
FEWEST_STEPS = 20


def read_sweep(text: str | None) -> bool:
    """Reads the option `--sweep` and returns whether to sweep; the only valid name is `lr`, the learning rate.

    Raises:
        HealError: The name is not `lr`.
    """
    if text not in (None, "lr"):
        raise HealError(f"--sweep: must be lr (got '{text}')")
    return text is not None


@runtime_checkable
class Trial(Protocol):
    """A stage that can be trained with a shorter schedule."""

    schedule: Schedule

    def run(self, log: None, on_step: Callable[[StepRecord], None], /) -> None:
        """Trains to the end of the schedule."""


def try_rates(rates: Sequence[float], begin: Callable[[float], Trial], student: nn.Module) -> dict[float, float]:
    """Runs one trial for each rate and restores the weights after each trial.

    Each trial is the stage with fewer tokens. Its learning rate rises and falls as in the stage, because rates can be
    compared only by the losses at the end of the fall.

    Args:
        rates: peak learning rates.
        begin: makes the trial of a rate.
        student: model whose weights the trials change.

    Returns:
        Rate to the mean loss in the last quarter of its trial; infinite if the trial diverged.
    """
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    losses: dict[float, float] = {}
    for rate in rates:
        records: list[StepRecord] = []
        trial = begin(rate)
        trial.schedule = shorten(trial.schedule)
        try:
            trial.run(None, records.append)
            last = [record.loss for record in records[-max(1, len(records) // 4) :]]
            losses[rate] = sum(last) / len(last)
        except HealInterrupted:
            raise
        except HealError:
            losses[rate] = math.inf
        with torch.no_grad():
            for name, value in student.named_parameters():
                value.copy_(before[name])
    return losses


def shorten(schedule: Schedule) -> Schedule:
    """Returns the schedule of a trial."""
    steps = min(schedule.num_steps, max(FEWEST_STEPS, round(SHARE * schedule.num_steps)))
    tokens = min(schedule.tokens, steps * schedule.sequences_per_step * schedule.context)
    return Schedule(**{**vars(schedule), "tokens": tokens})
