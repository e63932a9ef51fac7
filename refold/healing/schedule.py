"""The schedule of a stage: number of steps, and sequences and learning rate of each step."""

import math
from dataclasses import dataclass
from typing import Literal

CONSTANT_TAIL = 0.2
"""Share of the steps, at the end of the stage, in which the `constant` learning rate falls."""


@dataclass(frozen=True)
class Schedule:
    """Divides a stage into optimizer steps. Sequences and learning rate depend on the step number only.

    Attributes:
        tokens: training tokens of the stage.
        context: tokens of one sequence.
        sequences_per_step: sequences of one optimizer step.
        peak: highest learning rate.
        warmup: share of the steps over which the learning rate rises.
        shape: shape of the fall after the warm-up.
        floor: share of the peak at the last step.
        first_sequence: position of the stage's first sequence in the data; earlier stages read those before it.
    """

    tokens: int
    context: int
    sequences_per_step: int
    peak: float
    warmup: float
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.1
    first_sequence: int = 0

    @property
    def num_sequences(self) -> int:
        """Returns the number of sequences of the stage; the last one may be partly padding."""
        return -(-self.tokens // self.context)

    @property
    def num_steps(self) -> int:
        """Returns the number of optimizer steps of the stage; the last one may have fewer sequences."""
        return -(-self.num_sequences // self.sequences_per_step)

    def sequences(self, step: int) -> range:
        """Returns the positions of the sequences that a step reads; steps count from 0."""
        first = step * self.sequences_per_step
        last = min(first + self.sequences_per_step, self.num_sequences)
        return range(self.first_sequence + first, self.first_sequence + last)

    def tokens_after(self, num_steps: int) -> int:
        """Returns the number of training tokens after `num_steps` steps."""
        return min(num_steps * self.sequences_per_step * self.context, self.tokens)

    def learning_rate(self, step: int) -> float:
        """Returns a step's learning rate: linear to the peak, then down to `floor * peak` at the last step."""
        rising = math.ceil(self.warmup * self.num_steps)
        if step < rising:
            return self.peak * (step + 1) / rising
        done = (step - rising + 1) / max(1, self.num_steps - rising)
        return self.peak * (self.floor + (1 - self.floor) * self._left(done))

    def _left(self, done: float) -> float:
        """Returns the height above the floor, as a share of `peak - floor`, after the share `done` of the fall."""
        if self.shape == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        if self.shape == "linear":
            return 1 - done
        return min(1.0, (1 - done) / CONSTANT_TAIL)
