"""When frozen weights join in: the loss-improvement threshold of XATL, and its alternatives, decided while training."""

import math
from dataclasses import dataclass, replace

from refold.recipe.heal import Thaw


@dataclass(frozen=True)
class ThawState:
    """Where the decision stands. Plain data, so that it is JSON in a checkpoint.

    Attributes:
        total: sum of the losses of the window that is open.
        count: steps in it that had a loss.
        last: what the last whole window gave: its mean loss, or the norm of the weights at its end.
        below: windows in a row whose change was below the threshold.
        thawed_at: the step before which the weights thawed; None: they are frozen.
        reason: why, in words.
    """

    total: float = 0.0
    count: int = 0
    last: float | None = None
    below: int = 0
    thawed_at: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class ThawRule:
    """A stage's `thaw` section, in steps.

    Attributes:
        spec: the section.
        num_steps: of the stage.
    """

    spec: Thaw
    num_steps: int

    @property
    def window(self) -> int:
        """Steps of a window."""
        return max(1, round(self.spec.window * self.num_steps))

    @property
    def latest(self) -> int | None:
        """The step before which the weights thaw in any case; None: there is none."""
        return None if self.spec.latest == 1 else math.ceil(self.spec.latest * self.num_steps)

    def wants_norm(self, step: int) -> bool:
        """Says whether `after` needs the norm of the training weights after a step (counted from 1)."""
        return self.spec.when == "norm" and step % self.window == 0

    def after(self, state: ThawState, step: int, loss: float, norm: float | None = None) -> ThawState:
        """Returns the state after a step.

        Args:
            state: before it.
            step: counted from 1.
            loss: of the step; not finite where it was skipped, and then left out.
            norm: of the weights that train, where `wants_norm`.
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
        """Returns the share of the stage's learning rate that thawed weights have at a step (counted from 0)."""
        if state.thawed_at is None:
            return 0.0
        rising = math.ceil(self.spec.warmup * self.num_steps)
        return min(1.0, (step - state.thawed_at + 1) / max(1, rising))

    def _close(self, state: ThawState, step: int, norm: float | None) -> ThawState:
        """Ends a window and compares it with the one before."""
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
