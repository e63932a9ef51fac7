"""Rules that thaw frozen weights while a stage trains: XATL's threshold on the loss improvement, and alternatives."""

import math
from dataclasses import dataclass, replace

from refold.recipe.heal import Thaw


@dataclass(frozen=True)
class ThawState:
    """Holds the state of a thaw rule. All fields are plain data and are stored as JSON in a checkpoint.

    Attributes:
        total: sum of the losses of the current window.
        count: steps of the current window with a finite loss.
        last: value of the last complete window: its mean loss, or the norm of the weights at its end.
        below: number of successive windows whose change was below the threshold.
        thawed_at: number of steps done when the weights thawed; None: the weights are frozen.
        reason: reason for the thaw, as text.
    """

    total: float = 0.0
    count: int = 0
    last: float | None = None
    below: int = 0
    thawed_at: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class ThawRule:
    """Decides when a stage thaws its frozen weights.

    Attributes:
        spec: the `thaw` section of the stage.
        num_steps: steps of the stage.
    """

    spec: Thaw
    num_steps: int

    @property
    def window(self) -> int:
        """Returns the number of steps of a window."""
        return max(1, round(self.spec.window * self.num_steps))

    @property
    def latest(self) -> int | None:
        """Returns the number of steps after which the weights thaw in any case; None: there is no such limit."""
        return None if self.spec.latest == 1 else math.ceil(self.spec.latest * self.num_steps)

    def wants_norm(self, step: int) -> bool:
        """Returns whether `after` needs the norm of the training weights at a step (counted from 1)."""
        return self.spec.when == "norm" and step % self.window == 0

    def after(self, state: ThawState, step: int, loss: float, norm: float | None = None) -> ThawState:
        """Returns the state after a step.

        Args:
            state: state before the step.
            step: number of the step, counted from 1.
            loss: loss of the step; ignored if it is not finite, which means that the step was skipped.
            norm: norm of the weights that train; required if `wants_norm` returns true.
        """
        if state.thawed_at is not None:
            return state
        if math.isfinite(loss):
            state = replace(state, total=state.total + loss, count=state.count + 1)
        if step % self.window == 0 and self.spec.when != "share":
            state = self._close(state, step, norm)
        if state.thawed_at is None and self.latest is not None and step >= self.latest:
            state = replace(state, thawed_at=step, reason=f"{self.spec.latest:.0%} of the steps are done")
        return state

    def factor(self, state: ThawState, step: int) -> float:
        """Returns the factor on the learning rate of thawed weights at a step (counted from 0)."""
        if state.thawed_at is None:
            return 0.0
        rising = math.ceil(self.spec.warmup * self.num_steps)
        return min(1.0, (step - state.thawed_at + 1) / max(1, rising))

    def _close(self, state: ThawState, step: int, norm: float | None) -> ThawState:
        """Ends a window and compares its value with the value of the previous window."""
        if self.spec.when == "norm":
            assert norm is not None
            value = norm
        elif state.count == 0:
            return state
        else:
            value = state.total / state.count
        change = None
        if state.last is not None:
            gain = value - state.last if self.spec.when == "norm" else state.last - value
            change = gain / max(abs(state.last), 1e-12)
        below = state.below + 1 if change is not None and change < self.spec.threshold else 0
        state = replace(state, total=0.0, count=0, last=value, below=below)
        if below >= self.spec.patience:
            what = "norm grew" if self.spec.when == "norm" else "loss improved"
            windows = "a window" if below == 1 else f"each of {below} windows"
            reason = f"the {what} by less than {self.spec.threshold:.2%} in {windows} of {self.window} steps"
            state = replace(state, thawed_at=step, reason=reason)
        return state
