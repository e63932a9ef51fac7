"""Progress of a conversion: the steps of its phases, counted as one sum."""

from collections.abc import Callable
from typing import Literal, get_args

StepReport = Callable[[int, int], None]
"""Called with the steps done and the steps of all phases."""
DoneReport = Callable[[int], None]
"""Called with the steps of one phase that are done."""
Phase = Literal[
    "influence",
    "replacements",
    "moments",
    "shrinkage",
    "widths",
    "ranks",
    "vocabulary",
    "maps",
    "sequence",
    "write",
    "round",
]
"""Phases in the order in which they run: seven measurements, two kinds of fits, the tensors written, and rounded."""


class Progress:
    """Sums the steps of phases that run one after the other.

    Args:
        report: Called with the steps done and the steps of all phases; None: no report.
    """

    def __init__(self, report: StepReport | None = None):
        self._report = report
        self._steps: dict[Phase, int] = dict.fromkeys(get_args(Phase), 0)

    def expect(self, phase: Phase, steps: int) -> None:
        """Sets the number of steps of a phase; the number is 0 before."""
        self._steps[phase] = steps

    def of(self, phase: Phase) -> DoneReport:
        """Returns the callback of a phase, which takes the number of steps that the phase has done.

        All earlier phases count as complete, even if they did not report every step.
        """

        def tell(done: int) -> None:
            if self._report is not None:
                names = list(self._steps)
                before = sum(self._steps[name] for name in names[: names.index(phase)])
                self._report(before + done, sum(self._steps.values()))

        return tell
