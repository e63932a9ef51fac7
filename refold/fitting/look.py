"""Looking at candidates: converts a recipe, heals it if asked, and measures the costs and the loss of its model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from refold.blueprint.cost import cost
from refold.blueprint.schema import Blueprint
from refold.checkpoint.atomic_file import write_text
from refold.checkpoint.locate import PLAN_NAME, Source
from refold.checkpoint.manifest import MANIFEST_NAME
from refold.data.readers import DataSource
from refold.errors import RefoldError
from refold.evaluation.reference import Reference
from refold.evaluation.result import Comparison, Evaluation, KindScores, read_evaluation
from refold.fitting.device_table import DeviceTable
from refold.fitting.menu import Costs
from refold.fitting.step_times import blueprint_milliseconds
from refold.fitting.workspace import FitFolder
from refold.planning.plan import plan_model, read_plan
from refold.progress import Show
from refold.recipe.heal import HealStage
from refold.recipe.load import load_recipe
from refold.sources.source_model import SourceModel
from refold.studies.arm import RunArm

STORED_BYTES = 2
"""Bytes of a number in floats, by which budgets count."""
RecipeMapping = Mapping[str, object]
"""A recipe as a mapping, as YAML holds it."""


LookText = Literal["look", "report"]


class HeldOutSource(NamedTuple):
    """Held-out text, and the number of its tokens to score at most."""

    text: DataSource
    tokens: int


class TextLoss(NamedTuple):
    """Loss on one text, in nats per token over the source's.

    Attributes:
        loss: The difference of the mean losses.
        error: Its standard error, by document; None with fewer than two documents.
        source: The source's loss.
        tokens: Number of scored tokens.
        divergence: KL(source || model).
    """

    loss: float
    error: float | None
    source: float
    tokens: int
    divergence: float


class Looked(NamedTuple):
    """A candidate that was converted and measured.

    Attributes:
        name: Name of the candidate.
        recipe: Its recipe.
        folder: Folder of the candidate; its model may have been moved or deleted.
        blueprint: Its blueprint.
        costs: Its costs by the blueprint.
        losses: Loss by the name of the text.
        stages: Stages by which it was healed.
    """

    name: str
    recipe: RecipeMapping
    folder: Path
    blueprint: Blueprint
    costs: Costs
    losses: Mapping[str, TextLoss]
    stages: tuple[HealStage, ...] = ()

    @property
    def loss(self) -> float:
        """Mean of the losses of all texts: each kind of text counts alike."""
        return sum(each.loss for each in self.losses.values()) / len(self.losses)

    @property
    def divergence(self) -> float:
        """Mean divergence from the source, which the predictions estimate; it has far less noise than a loss."""
        return sum(each.divergence for each in self.losses.values()) / len(self.losses)


def blueprint_costs(blueprint: Blueprint, context: int) -> Costs:
    """Returns the costs of a blueprint, floats at two bytes; milliseconds are 0."""
    counted = cost(blueprint, STORED_BYTES)
    return Costs(*map(float, (counted.weight_bytes, counted.cache_bytes(context), counted.flops(context))))


def text_losses(found: Evaluation) -> dict[str, TextLoss]:
    """Returns the loss over the source by text, in nats per token."""
    assert found.against is not None
    if found.kinds:
        return {kind.name: _nats(kind, kind) for kind in found.kinds}
    return {found.data[0].name if found.data else "text": _nats(found, found.against)}


def _nats(scored: Evaluation | KindScores, compared: Comparison | KindScores) -> TextLoss:
    unit = math.log(2) * scored.bytes / scored.tokens
    assert compared.difference is not None
    assert compared.kl is not None
    error = None if compared.difference_error is None else compared.difference_error * unit
    source = (scored.bits_per_byte - compared.difference) * unit
    return TextLoss(compared.difference * unit, error, source, scored.tokens, compared.kl)


@dataclass
class Looker:
    """Converts recipes of one source and measures them; everything that is done once is kept.

    Attributes:
        source: The source.
        model: The source, read for planning.
        folder: Folder of the fit.
        train: Calibration and healing text.
        held_out: Text on which candidates are compared (`look`), and text on which the result is reported (`report`).
        context: Tokens at which cache and FLOPs are counted.
        device: Device of healing and evaluation; None: the best one.
        command: Command line, for the provenance.
        show: Shows the progress.
        table: Table of a device, from which the milliseconds of candidates are taken.
        exported_bytes: Bytes of a blueprint in the format of an engine, which count instead if there are more.
    """

    source: Source
    model: SourceModel
    folder: FitFolder
    train: DataSource
    held_out: Mapping[LookText, HeldOutSource]
    context: int
    device: str | None
    command: str
    show: Show
    table: DeviceTable | None = None
    exported_bytes: Callable[[Blueprint], int | None] = lambda blueprint: None

    @cached_property
    def against(self) -> Reference:
        """Predictions of the source, which are computed once."""
        return Reference(self.source, device=self.device)

    def look(
        self, recipe: RecipeMapping, name: str, text: LookText = "look", stages: tuple[HealStage, ...] = ()
    ) -> Looked:
        """Converts a recipe, heals it, and measures it, each if this was not done before.

        Weights that the recipe stores as integers are rounded after healing.

        Args:
            recipe: The recipe, without `heal`.
            name: Name of the candidate.
            text: The text to measure on.
            stages: Healing stages.

        Raises:
            RefoldError: The errors of conversion, healing and evaluation.
        """
        folder = self._folder(recipe, name, stages)
        # Figures on fewer tokens are no figures on more.
        figures = f"{text}-{self.held_out[text].tokens}"
        plan_file, figures_file = folder / PLAN_NAME, folder / f"{figures}.json"
        known = self._read(plan_file, figures_file)
        if known is None:
            self._arm(folder, stages, text).evaluate(self.make(recipe, name, stages), figures)
            known = read_plan(plan_file).blueprint, text_losses(read_evaluation(figures_file))
        blueprint, losses = known
        return Looked(name, recipe, folder, blueprint, self.costs(blueprint), losses, stages)

    def _read(self, plan_file: Path, figures_file: Path) -> tuple[Blueprint, dict[str, TextLoss]] | None:
        """Returns what is known of a candidate; None: nothing yet, or a file is damaged and is deleted."""
        if not (plan_file.exists() and figures_file.exists()):
            return None
        try:
            return read_plan(plan_file).blueprint, text_losses(read_evaluation(figures_file))
        except RefoldError as error:
            self.show.say(f"{plan_file.parent.name}: measured again ({error})")
            figures_file.unlink()
            return None

    def make(self, recipe: RecipeMapping, name: str, stages: tuple[HealStage, ...] = ()) -> Path:
        """Converts a recipe and heals it, each if this was not done before, and returns the model's folder.

        Its plan and its manifest are copied beside it, and stay there when the model is moved or deleted.

        Args:
            recipe: The recipe, without `heal`.
            name: Name of the candidate.
            stages: Healing stages.

        Raises:
            RefoldError: The errors of conversion and healing.
        """
        loaded = load_recipe(dict(recipe)).model_copy(update={"heal": stages})
        folder = self._folder(recipe, name, stages)
        arm = self._arm(folder, stages, "look")
        model = arm.heal(arm.convert(plan_model(self.model, loaded, allow_larger=True)))
        assert isinstance(model, Path)
        if stages and loaded.quantise is not None:
            model = arm.quantise(model, loaded)
        for kept in (MANIFEST_NAME, PLAN_NAME):
            write_text(folder / kept, (model / kept).read_text(encoding="utf-8"))
        return model

    def _folder(self, recipe: RecipeMapping, name: str, stages: tuple[HealStage, ...]) -> Path:
        return self.folder.candidate({**recipe, "heal": [each.model_dump(mode="json") for each in stages]}, name)

    def costs(self, blueprint: Blueprint) -> Costs:
        """Returns the costs of a blueprint; milliseconds are 0 without a table of a device."""
        counted = blueprint_costs(blueprint, self.context)
        counted = counted._replace(bytes=max(counted.bytes, float(self.exported_bytes(blueprint) or 0)))
        if self.table is None:
            return counted
        return counted._replace(milliseconds=blueprint_milliseconds(blueprint, self.table, self.context))

    def _arm(self, folder: Path, stages: tuple[HealStage, ...], text: LookText) -> RunArm:
        moments, held_out = self.folder.measured / "moments", self.held_out[text]
        return RunArm(
            folder=folder,
            source=self.source,
            train=self.train,
            held_out=held_out.text,
            stages=stages,
            against=self.against,
            eval_tokens=held_out.tokens,
            device=self.device,
            command=self.command,
            show=self.show,
            moments=moments if moments.exists() else None,
        )
