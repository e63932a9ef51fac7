"""Chooses a learning rate by short trials from the same weights on the same data."""

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
"""Of the stage's learning rate."""
SHARE = 0.05
"""Of the stage's steps, in each trial."""
FEWEST_STEPS = 20


def read_sweep(text: str | None) -> bool:
    """Reads the name of the setting that is swept; only the learning rate, `lr`, can be.

    Raises:
        HealError: Another name.
    """
    if text not in (None, "lr"):
        raise HealError(f"--sweep: must be lr (got '{text}')")
    return text is not None


@runtime_checkable
class Trial(Protocol):
    """A stage that can be run for a while."""

    schedule: Schedule

    def run(self, log: None, on_step: Callable[[StepRecord], None], /) -> None:
        """Trains to the end of its schedule."""


def try_rates(rates: Sequence[float], begin: Callable[[float], Trial], student: nn.Module) -> dict[float, float]:
    """Runs one trial for each rate and puts the weights back afterwards.

    Each trial is the stage with fewer tokens: its learning rate rises and falls as in the stage, because rates compare
    at the end of their fall only.

    Args:
        rates: peak learning rates.
        begin: makes the trial of a rate.
        student: whose weights are tried.

    Returns:
        Rate to the mean loss of the trial's last quarter; infinite where it diverged.
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
