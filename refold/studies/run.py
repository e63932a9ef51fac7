"""The one line one would forward to a colleague."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from refold.checkpoint.atomic_file import is_unfinished, write_json
from refold.checkpoint.folder import settle
from refold.checkpoint.locate import PLAN_NAME, Source, locate
from refold.checkpoint.lock import FolderLock
from refold.checkpoint.manifest import check, is_refold_folder
from refold.conversion.convert import carry_out
from refold.data.corpus import Data, open_text
from refold.data.mixture import describe_one_kind
from refold.data.readers import DataSource
from refold.data.split import split
from refold.errors import FolderError, RecipeError
from refold.evaluation.evaluate import evaluate
from refold.evaluation.reference import Reference
from refold.evaluation.result import Evaluation, read_evaluation
from refold.healing.heal import heal
from refold.healing.run import HealOptions
from refold.modeling.load import choose_device
from refold.planning.plan import Draft, Plan, StackPlan, plan_model, read_plan
from refold.recipe.heal import HealStage, scale_stages
from refold.recipe.load import RecipeLike, load_recipe
from refold.recipe.recipe import Recipe
from refold.sources.source_model import SourceModel, read_source_model
from refold.studies.baselines import (
    BASELINES,
    BaselineJob,
    default_baselines,
    require_baseline,
    whole_model_stages,
)


def describe_size(ratio: float) -> str:
    """`48% smaller`, `12% larger` or `the same size`."""
    change = round(abs(1 - ratio) * 100)
    return "the same size" if change == 0 else f"{change}% {'smaller' if ratio < 1 else 'larger'}"


def describe_loss(difference: float, error: float | None = None) -> str:
    """`+0.041`, with its standard error where one is known and it matters."""
    certain = error is None or abs(difference) >= 2 * error
    return f"{difference:+.3f}" + ("" if certain else f" ± {error:.3f}")


def report_line(
    name: str,
    plan: Plan,
    difference: float,
    difference_error: float | None,
    baselines: dict[str, float],
    context: int,
) -> str:
    """Says what was saved and what it cost.

    Args:
        name: Of the recipe.
        plan: Carried out.
        difference: Bits per byte above the source.
        difference_error: Its standard error.
        baselines: What a rival costs in bits per byte above the source, by description.
        context: Tokens at which cache and FLOPs are compared.
    """
    rows = {row.quantity: row.ratio for row in plan.summary(context)}
    rivals = ", ".join(f"{rival}: {describe_loss(lost)}" for rival, lost in baselines.items())
    size = describe_size(rows["weight_bytes"] or 1.0)
    loss = f"{describe_loss(difference, difference_error)} bits per byte to the source"
    cache, compute = (1.0 if rows[key] is None else rows[key] for key in ("cache_bytes", "flops"))
    return f"{name}: {size}, {loss}{f' ({rivals})' if rivals else ''}, cache {cache:.2f}x, compute {compute:.2f}x"


RUN_NAME = "run.json"
SUMMARY_NAME = "summary.json"
CONTEXT = 8192

Say = Callable[[str], None]
"""Told what begins."""


@dataclass(frozen=True)
class RunSettings:
    """What a run is made of; a run folder goes on only with the settings it was begun with.

    Attributes:
        tokens: Healing tokens, over the recipe's own; 0: no healing; None: the recipe's.
        baselines: Which of `BASELINES` are made and measured alike; None: depth pruning and the source quantised, or
            for a target as large as its source the same from scratch.
        eval_tokens: How much held-out text is read.
        learning_rate: Over the recipe's own.
        seed: Of the order of the data, over the recipe's own.
        device: Where to train and evaluate; None: the best there is.

    Raises:
        RecipeError: An unknown baseline.
    """

    tokens: int | None = None
    baselines: tuple[str, ...] | None = None
    eval_tokens: int | None = 200_000
    learning_rate: float | None = None
    seed: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name in self.baselines or ():
            require_baseline(name)

    def stages(self, recipe: Recipe) -> tuple[HealStage, ...]:
        """Returns how a recipe's model is healed, with these settings over its own."""
        if self.tokens == 0:
            return ()
        stages = recipe.heal or ((HealStage(tokens=self.tokens),) if self.tokens else ())
        wanted = {"seed": self.seed, "learning_rate": self.learning_rate}
        changes = {key: value for key, value in wanted.items() if value is not None}
        if self.tokens is not None:
            stages = tuple(scale_stages(stages, self.tokens))
        return tuple(stage.model_copy(update=changes) for stage in stages)


@dataclass(frozen=True)
class RunResult:
    """What a run found.

    Attributes:
        plan: Of the folded model.
        model: Its folder, healed.
        unhealed: Evaluation right after conversion.
        healed: Evaluation of `model`.
        baselines: Evaluations of the rivals, by name.
        line: The report.
        notes: Lines on the data: the price of one kind of text.
    """

    plan: Plan
    model: Path
    unhealed: Evaluation
    healed: Evaluation
    baselines: dict[str, Evaluation]
    line: str
    notes: tuple[str, ...] = ()


@dataclass
class _Way:
    """One arm of a run: its folder and what it goes through."""

    folder: Path
    source: Source
    train: DataSource
    held_out: DataSource
    settings: RunSettings
    stages: tuple[HealStage, ...]
    command: str
    say: Say
    against: Reference

    def convert(self, plan: Draft) -> Path:
        target = self.folder / "converted"
        if not _stands(target):
            self.say(f"{self.folder.name}: converting")
            carry_out(plan, self.source, target, command=self.command, calibration=self.train)
        return target

    def heal(self, start: str | Path | Source) -> Path | Source:
        """Runs the stages; without any, the start is what is measured."""
        if not self.stages:
            return start if isinstance(start, Source) else Path(start)
        target = self.folder / "model"
        if not _stands(target):
            self.say(f"{self.folder.name}: healing for {sum(stage.tokens for stage in self.stages):,} tokens")
            options = HealOptions(command=self.command)
            heal(start, target, self.train, self.stages, device=self.settings.device, options=options)
        return target

    def evaluate(self, model: str | Path | Source, name: str, quantise: str | None = None) -> Evaluation:
        path = self.folder / f"{name}.json"
        if not path.exists():
            self.say(f"{self.folder.name}: evaluating ({name})")
            evaluate(
                model,
                self.held_out,
                against=self.against,
                max_tokens=self.settings.eval_tokens,
                device=self.settings.device,
                quantise=quantise,
            ).write(path)
        return read_evaluation(path)


def run(
    source: str | Path,
    destination: str | Path,
    recipe: RecipeLike = "relaxed",
    data: Data = (),
    overrides: Sequence[str] = (),
    *,
    held_out: Data | None = None,
    settings: RunSettings | None = None,
    allow_larger: bool = False,
    command: str = "",
    say: Say = lambda text: None,
) -> RunResult:
    """Plans, converts, heals and evaluates, and does the same to the baselines. Calling it again goes on.

    The run folder holds `folded/` and a folder for each baseline, each with `converted/`, `model/` (healed) and its
    evaluations, and `summary.json`.

    Args:
        source: Folder or hub id.
        destination: The run folder.
        recipe: Built-in name, YAML file, mapping or Recipe.
        data: Text to heal and calibrate on (see `refold.data.corpus`), best of several kinds with weights; without
            `held_out` a fiftieth of each kind, chosen by content, is kept for evaluation.
        overrides: `key.path=value` strings.
        held_out: Text to evaluate on.
        settings: Tokens, baselines and the like.
        allow_larger: Accept a target that is smaller than its source in nothing.
        command: Command line, for the provenance.
        say: Told what begins.

    Raises:
        RefoldError: As the stages do, or the folder holds something else.
    """
    settings = settings or RunSettings()
    choose_device(settings.device)
    loaded = load_recipe(recipe, overrides)
    name = (
        recipe if isinstance(recipe, str) and "/" not in recipe and not recipe.endswith((".yaml", ".yml")) else "folded"
    )
    located = locate(source)
    model = read_source_model(located)
    plan = plan_model(model, loaded, allow_larger)
    located.ignore_tensors = tuple((each.name, each.reason) for each in plan.recipe.ignore_tensors)
    stages = settings.stages(plan.recipe)
    opened = open_text(data)
    train, test = split(opened) if held_out is None else (opened, open_text(held_out))
    price = describe_one_kind(opened, "healing")
    if price is not None and not (Path(destination) / RUN_NAME).exists():
        say(price)
    chosen = default_baselines(plan) if settings.baselines is None else settings.baselines
    root = _claim(Path(destination), plan, settings, train, test)
    with FolderLock(root):
        against = Reference(located, device=settings.device)
        folded = _Way(root / "folded", located, train, test, settings, stages, command, say, against)
        for_all = whole_model_stages(stages)
        ways = {arm: _Way(root / arm, located, train, test, settings, for_all, command, say, against) for arm in chosen}
        converted = folded.convert(plan)
        made = read_plan(converted / PLAN_NAME)
        unhealed = folded.evaluate(converted, "unhealed")
        healed_model = folded.heal(converted)
        assert isinstance(healed_model, Path)
        healed = folded.evaluate(healed_model, "healed") if stages else unhealed
        rivals = {arm: _baseline(way, model, made) for arm, way in ways.items()}
        result = _summarise(
            name, made, healed_model, unhealed, healed, {k: v for k, v in rivals.items() if v is not None}
        )
        result = replace(result, notes=() if price is None else (price,))
        _write_summary(root, result, settings)
    return result


def _baseline(way: _Way, model: SourceModel, plan: Plan) -> Evaluation | None:
    name = way.folder.name
    baseline = BASELINES[name]
    if baseline.needs_healing and not way.stages:
        return None
    try:
        start = baseline.start(BaselineJob(way.source, model, plan, way.convert))
    except RecipeError as error:
        way.say(f"{name}: no baseline ({error})")
        return None
    if baseline.scheme is not None:
        return way.evaluate(start, "unhealed", baseline.scheme(plan))
    return way.evaluate(way.heal(start), "healed" if way.stages else "unhealed")


def _stands(folder: Path) -> bool:
    """Whether a folder was finished in an earlier go."""
    settle(folder)
    if not folder.exists():
        return False
    if is_refold_folder(folder):
        check(folder)
    return True


def _claim(root: Path, plan: StackPlan, settings: RunSettings, train: DataSource, held_out: DataSource) -> Path:
    """Makes the run folder, or checks that it is the one of this very run."""
    wanted = {
        "format": 1,
        "source": plan.source.model_dump(mode="json"),
        "recipe": plan.recipe.model_dump(mode="json"),
        "settings": {key: value for key, value in vars(settings).items() if key != "device"},
        "data": train.identity,
        "held_out": held_out.identity,
    }
    wanted = json.loads(json.dumps(wanted))
    path = root / RUN_NAME
    if path.exists():
        begun = json.loads(path.read_text(encoding="utf-8"))
        # A run that an older version began does not know all of the source's fingerprint.
        wanted["source"] = {key: value for key, value in wanted["source"].items() if key in begun.get("source", {})}
        different = sorted(key for key in wanted if begun.get(key) != wanted[key])
        if different:
            raise FolderError(
                f"{root}: this run is required to go on with what it began with (different: {', '.join(different)}); "
                f"choose another output"
            )
        return root
    if root.exists() and not all(is_unfinished(path) for path in root.iterdir()):
        raise FolderError(f"{root}: a new folder, or one of an earlier run, is required (it holds other files)")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"{root}: a writable place is required ({error.strerror}); choose another output") from None
    write_json(path, wanted)
    return root


def _summarise(
    name: str, plan: Plan, model: Path, unhealed: Evaluation, healed: Evaluation, rivals: dict[str, Evaluation]
) -> RunResult:
    assert healed.against is not None
    lost = {
        _describe(arm, found): found.against.difference for arm, found in rivals.items() if found.against is not None
    }
    context = min(CONTEXT, plan.blueprint.arch.max_position_embeddings)
    line = report_line(name, plan, healed.against.difference, healed.against.difference_error, lost, context)
    return RunResult(plan, model, unhealed, healed, rivals, line)


def _describe(arm: str, found: Evaluation) -> str:
    """What a baseline is; of a quantised one also its real size, which no recipe gives it."""
    description = BASELINES[arm].description
    if found.model.quantised is None or found.against is None:
        return description
    size = describe_size(found.model.weight_bytes / found.against.model.weight_bytes)
    return f"{description} in {found.model.quantised}, {size}"


def _write_summary(root: Path, result: RunResult, settings: RunSettings) -> None:
    data = {
        "line": result.line,
        "notes": list(result.notes),
        "model": str(result.model.relative_to(root)) if result.model.is_relative_to(root) else str(result.model),
        "cost": result.plan.cost.model_dump(mode="json"),
        "settings": vars(settings),
        "unhealed": result.unhealed.model_dump(mode="json"),
        "healed": result.healed.model_dump(mode="json"),
        "baselines": {name: found.model_dump(mode="json") for name, found in result.baselines.items()},
    }
    write_json(root / SUMMARY_NAME, data)
