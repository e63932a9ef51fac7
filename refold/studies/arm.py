"""One arm of a run: a folder in which a model is converted, healed and evaluated once."""

from dataclasses import dataclass
from pathlib import Path

from refold.checkpoint.folder import settle
from refold.checkpoint.locate import Source
from refold.checkpoint.manifest import check, is_refold_folder
from refold.conversion.convert import ConvertOptions, carry_out
from refold.conversion.quantise import QuantiseOptions, quantise
from refold.data.readers import DataSource
from refold.evaluation.evaluate import evaluate
from refold.evaluation.reference import Reference
from refold.evaluation.result import Evaluation, read_evaluation
from refold.evaluation.settings import EvaluationSettings
from refold.healing.heal import heal
from refold.healing.run import HealOptions
from refold.planning.plan import Draft
from refold.progress import Show
from refold.recipe.heal import HealStage
from refold.recipe.recipe import Recipe


@dataclass
class RunArm:
    """Converts, heals and evaluates the folded model of a run, or a baseline.

    Attributes:
        folder: Folder of the arm inside the run folder.
        source: Source of the run.
        train: Text for healing and calibration.
        held_out: Text for evaluation.
        stages: Healing stages; empty: no healing.
        against: The source's predictions.
        eval_tokens: Number of held-out tokens to score.
        device: Device for training and evaluation; None: the best available device.
        command: Command line, recorded in the provenance.
        show: Shows the progress.
        moments: Moments of the source that its fits are weighted by; None: measured by the conversion.
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
    moments: Path | None = None

    def convert(self, plan: Draft) -> Path:
        """Carries out a plan, if this was not done before, and returns the model folder."""
        target = self.folder / "converted"
        if not is_finished(target):
            self.show.say(f"{self.folder.name}: converting")
            with self.show.progress(f"{self.folder.name}: converting", "steps") as report:
                carry_out(
                    plan,
                    self.source,
                    target,
                    options=ConvertOptions(command=self.command, progress=report),
                    calibration=self.train,
                    moments=self.moments if plan.recipe.needs_text else None,
                )
        return target

    def heal(self, start: str | Path | Source) -> Path | Source:
        """Heals a model, if this was not done before, and returns the healed folder; without stages returns `start`."""
        if not self.stages:
            return start if isinstance(start, Source) else Path(start)
        target = self.folder / "model"
        if not is_finished(target):
            self.show.say(f"{self.folder.name}: healing for {sum(stage.tokens for stage in self.stages):,} tokens")
            options = HealOptions(device=self.device, command=self.command)
            heal(start, target, self.train, self.stages, options=options)
        return target

    def quantise(self, model: Path, recipe: Recipe) -> Path:
        """Stores a healed model in the integers of a recipe, if this was not done before, and returns the folder."""
        section, calibration = recipe.quantise, recipe.calibration
        assert section is not None
        target = self.folder / "quantised"
        if not is_finished(target):
            self.show.say(f"{self.folder.name}: rounding")
            with self.show.progress(f"{self.folder.name}: rounding", "steps") as report:
                options = QuantiseOptions(
                    section.rounding,
                    context=calibration.context,
                    shrink=calibration.shrink,
                    seed=recipe.seed,
                    command=self.command,
                    progress=report,
                    layers=section.layers,
                )
                data = None if section.rounding == "plain" else self.train
                quantise(
                    model, target, section.to, keep=section.keep, data=data, tokens=calibration.tokens, options=options
                )
        return target

    def evaluate(self, model: str | Path | Source, name: str, quantise: str | None = None) -> Evaluation:
        """Evaluates a model against the source, if this was not done before, and stores the figures in `NAME.json`."""
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


def is_finished(folder: Path) -> bool:
    """Returns whether a folder is complete from an earlier run."""
    settle(folder)
    if not folder.exists():
        return False
    if is_refold_folder(folder):
        check(folder)
    return True
