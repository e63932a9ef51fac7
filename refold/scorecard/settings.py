"""Settings of a scorecard: which sections are measured, and on how much."""

from dataclasses import dataclass, field
from pathlib import Path

from refold.errors import RefoldError
from refold.evaluation.settings import EvaluationSettings
from refold.scorecard.amounts import ScoreAmounts


@dataclass(frozen=True)
class ScoreSettings:
    """Settings of one scorecard.

    Attributes:
        text: Windows, amount of text, dtype, device and quantisation.
        tasks: Names of few-shot tasks, groups of tasks, or paths of task files; empty: no tasks.
        task_data: Folder with the tasks' items as `NAME.jsonl`; None: lm-eval reads them from the hub.
        shots: Worked examples before each item; None: those of the task.
        limit: Items of each task, drawn with `seed` and stratified by the place of the right answer; None: all.
        recall: Whether to measure recall, by teacher forcing.
        exits: Whether to measure the quality that exits keep, chosen by an oracle and by calibrated thresholds.
        branches: Whether to measure a hybrid's text loss with each branch off.
        noise: Whether to measure the loss on clean text after noisy text.
        speed: Whether to measure speed, first token, peak memory and state.
        seed: Seed of drawn items, made texts and noise.
        amounts: Lengths, items, documents and repeats of the sections that are made on the spot.

    Raises:
        RefoldError: `task_data`, `shots` or `limit` is given without tasks.
    """

    text: EvaluationSettings = field(default_factory=EvaluationSettings)
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    shots: int | None = None
    limit: int | None = None
    recall: bool = False
    exits: bool = False
    branches: bool = False
    noise: bool = False
    speed: bool = False
    seed: int = 0
    amounts: ScoreAmounts = field(default_factory=ScoreAmounts)

    def __post_init__(self) -> None:
        for name in ("task_data", "shots", "limit"):
            value = getattr(self, name)
            if value is not None and not self.tasks:
                raise RefoldError(f"{name}: tasks are required with it (got {value} without tasks); name tasks: seven")
