"""One arm of a run: its folder, and how it is converted, healed and evaluated there, each once."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from refold.checkpoint.folder import settle
from refold.checkpoint.locate import Source
from refold.checkpoint.manifest import check, is_refold_folder
from refold.conversion.convert import ConvertOptions, carry_out
from refold.data.readers import DataSource
from refold.evaluation.evaluate import evaluate
from refold.evaluation.reference import Reference
from refold.evaluation.result import Evaluation, read_evaluation
from refold.evaluation.settings import EvaluationSettings
from refold.healing.heal import heal
from refold.healing.run import HealOptions
from refold.planning.plan import Draft
from refold.recipe.heal import HealStage

Say = Callable[[str], None]
"""Prints a line on what begins."""
Report = Callable[[int, int], None]
"""Told (steps done, steps in all)."""


@contextlib.contextmanager
def _no_bar(label: str, unit: str) -> Iterator[Report]:
    yield lambda done, total: None


@dataclass(frozen=True)
class Show:
    """How a run tells the user where it is.

    Attributes:
        say: Prints a line.
        progress: Makes a progress bar from a label and a unit; its `with` body gets a `Report`.
    """

    say: Say = lambda text: None
    progress: Callable[[str, str], contextlib.AbstractContextManager[Report]] = _no_bar


@dataclass
class RunArm:
    """The folded model of a run, or a baseline.

    Attributes:
        folder: Its folder inside the run folder.
        source: Source of the run.
        train: Text to heal on.
        held_out: Text to evaluate on.
        stages: How it is healed; empty: it is not.
        against: The source's predictions.
        eval_tokens: Held-out tokens to score.
        device: Where to train and evaluate; None: the best there is.
        command: Command line, for the provenance.
        show: Where it is.
    """

    folder: Path
    source: Source
    train: DataSource
    held_out: DataSource
    stages: tuple[HealStage, ...]
    against: Reference
    eval_tokens: int | None
    device: str | None
    command: str
    show: Show

    def convert(self, plan: Draft) -> Path:
        """Carries out a plan, once, and returns the model folder."""
        target = self.folder / "converted"
        if not _is_finished(target):
            self.show.say(f"{self.folder.name}: converting")
            with self.show.progress(f"{self.folder.name}: converting", "steps") as report:
                carry_out(
                    plan,
                    self.source,
                    target,
                    options=ConvertOptions(command=self.command, progress=report),
                    calibration=self.train,
                )
        return target

    def heal(self, start: str | Path | Source) -> Path | Source:
        """Runs the stages, once, and returns the healed folder; without stages returns the start."""
        if not self.stages:
            return start if isinstance(start, Source) else Path(start)
        target = self.folder / "model"
        if not _is_finished(target):
            self.show.say(f"{self.folder.name}: healing for {sum(stage.tokens for stage in self.stages):,} tokens")
            options = HealOptions(device=self.device, command=self.command)
            heal(start, target, self.train, self.stages, options=options)
        return target

    def evaluate(self, model: str | Path | Source, name: str, quantise: str | None = None) -> Evaluation:
        """Evaluates a model against the source, once, and keeps the figures in `NAME.json`."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            self.show.say(f"{self.folder.name}: evaluating ({name})")
            with self.show.progress(f"{self.folder.name}: evaluating", "windows") as report:
                found = evaluate(
                    model,
                    self.held_out,
                    EvaluationSettings(max_tokens=self.eval_tokens, device=self.device, quantise=quantise),
                    against=self.against,
                    progress=report,
                )
            found.write(path)
        return read_evaluation(path)


def _is_finished(folder: Path) -> bool:
    """Whether a folder was finished in an earlier go."""
    settle(folder)
    if not folder.exists():
        return False
    if is_refold_folder(folder):
        check(folder)
    return True
