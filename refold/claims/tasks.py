"""Task scores and speed of an arm beside the source's, by scorecards."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from refold.claims.claim import ClaimArm, ClaimNotRun
from refold.claims.contrast import finding
from refold.claims.evidence import Samples, combine, estimate, estimate_by_seed
from refold.claims.record import FindingRecord, ReadingRecord
from refold.errors import RefoldError
from refold.scorecard.job import SectionNotRun
from refold.scorecard.record import Scorecard, TaskSection
from refold.scorecard.score import score
from refold.scorecard.settings import ScoreSettings

if TYPE_CHECKING:
    from refold.claims.workbench import Workbench

TASKS = ("seven",)
"""The group of the seven tasks of Relaxed Recursive Transformers."""


@dataclass(frozen=True)
class TaskShare:
    """A comparison of task scores, that holds if an arm keeps a share of the source's.

    Attributes:
        arm: The arm.
        share: The share.
    """

    arm: ClaimArm
    share: float

    @property
    def arms(self) -> tuple[ClaimArm, ...]:
        """The arm."""
        return (self.arm,)

    def find(self, bench: "Workbench") -> list[FindingRecord]:
        """Scores the source and every seed of the arm on the same items.

        Raises:
            ClaimNotRun: There are no items, or the tasks cannot be scored.
        """
        folder = bench.require("task_data", "few-shot tasks are required; give --task-data FOLDER")
        settings = ScoreSettings(tasks=TASKS, task_data=folder, limit=bench.scale.task_items)
        found = [_card(each, settings, "tasks").tasks for each in (bench.source, *bench.folders(self.arm))]
        sections = [section for section in found if section is not None]
        source, mine = task_samples(sections[:1]), task_samples(sections[1:])
        effect = estimate(combine([(1.0, mine), (-self.share, source)]))
        readings = tuple(
            ReadingRecord(name=name, value=each.value, error=each.error, by_seed=tuple(map(float, each.by_seed)))
            for name, each in (("the source", source), (self.arm.name, mine))
        )
        name = f"{self.arm.name} keeps {self.share:.0%} of the source's score"
        return [finding(name, "few-shot tasks", "mean score", effect, 0.0, readings)]


def task_samples(sections: Sequence[TaskSection]) -> Samples:
    """Returns the score of every item of some models, weighted so that every task counts the same."""
    tasks = sections[0].tasks
    total = sum(len(task.right) for task in tasks)
    amounts = [
        [right * total / (len(tasks) * len(task.right)) for task in section.tasks for right in task.right]
        for section in sections
    ]
    return Samples(np.asarray(amounts, dtype=np.float64), np.ones(total, dtype=np.int64))


@dataclass(frozen=True)
class SpeedRatio:
    """A comparison of decoding speed, that holds if an arm is faster than the source by a factor.

    Attributes:
        arm: The arm.
        factor: The factor.
    """

    arm: ClaimArm
    factor: float

    @property
    def arms(self) -> tuple[ClaimArm, ...]:
        """The arm."""
        return (self.arm,)

    def find(self, bench: "Workbench") -> list[FindingRecord]:
        """Measures every seed in turns with the source; the effect is the binary logarithm of ratio over factor.

        Raises:
            ClaimNotRun: The speed cannot be measured.
        """
        cards = [_card(each, ScoreSettings(speed=True), "speed", bench.source) for each in bench.folders(self.arm)]
        ratios = []
        for card in cards:
            assert card.speed is not None
            assert card.speed.against is not None
            ratios.append(card.speed.tokens_per_second / card.speed.against.tokens_per_second)
        effect = estimate_by_seed([math.log2(ratio / self.factor) for ratio in ratios])
        note = f"{2**effect.value * self.factor:.2f} times the source's speed"
        name = f"{self.arm.name} decodes {self.factor:g} times as fast as the source"
        return [finding(name, "decoding", "doublings of speed", effect, 0.0, note=note)]


def _card(model: Any, settings: ScoreSettings, section: str, against: Any = None) -> Scorecard:
    """Returns a scorecard that has a section.

    Raises:
        ClaimNotRun: The section could not be measured; the message is the scorecard's.
    """
    try:
        card = score([model], settings=settings, against=against)[0]
    except (SectionNotRun, RefoldError) as error:
        raise ClaimNotRun(str(error)) from error
    for missing in card.not_run:
        raise ClaimNotRun(f"{section}: {missing.why}")
    return card
