"""A checked run, before any file is written: source, recipe, text, stages and baselines."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from refold.checkpoint.locate import Source, locate
from refold.data.corpus import Data, open_text
from refold.data.mixture import describe_one_kind
from refold.data.readers import DataSource
from refold.data.split import split
from refold.errors import HealError, RecipeError
from refold.modeling.load import choose_device
from refold.planning.plan import Draft, plan_model
from refold.progress import Show
from refold.recipe.heal import HealStage, scale_stages
from refold.recipe.load import RecipeLike, load_recipe
from refold.recipe.recipe import Recipe
from refold.recipe.stages import choose_stages
from refold.sources.source_model import SourceModel, read_source_model
from refold.studies.baselines import default_baselines, require_baseline

DEFAULT_RECIPE = "lowrank"
FEWEST_EVAL_TOKENS, MOST_EVAL_TOKENS = 8_000, 200_000
EVAL_SHARE = 4
"""Healing tokens for each held-out token that is scored."""


@dataclass(frozen=True)
class RunSettings:
    """Settings that affect the figures of a run; a run folder resumes only with its original settings.

    Attributes:
        tokens: Healing tokens, which replace those of the recipe; 0: no healing; None: those of the recipe.
        baselines: Names of `BASELINES` to compare with; None: depth pruning and the quantised source, or `scratch` if
            the target is as large as its source.
        eval_tokens: Held-out tokens to score; None: a quarter of the healing tokens, between 8,000 and 200,000.
        device: Device for training and evaluation; None: the best available device.

    Raises:
        RecipeError: A baseline is unknown, or a number is below its least value.
    """

    tokens: int | None = None
    baselines: tuple[str, ...] | None = None
    eval_tokens: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name in self.baselines or ():
            require_baseline(name)
        for key, least in (("tokens", 0), ("eval_tokens", 2)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise RecipeError(f"--{key.replace('_', '-')}: must be at least {least} (got {value})")

    def stages(self, recipe: Recipe) -> tuple[HealStage, ...]:
        """Returns the healing stages of a recipe with the budget of these settings."""
        if self.tokens == 0:
            return ()
        stages = recipe.heal or (choose_stages(tokens=self.tokens) if self.tokens else ())
        return stages if self.tokens is None else tuple(scale_stages(stages, self.tokens))


@dataclass(frozen=True)
class RunOptions:
    """Options of a run apart from its settings.

    Attributes:
        overrides: `key.path=value` strings that change the recipe.
        allow_larger: Accept a target that is smaller than its source in no quantity.
        command: Command line, recorded in the provenance.
        show: Shows the progress to the user.
    """

    overrides: Sequence[str] = ()
    allow_larger: bool = False
    command: str = ""
    show: Show = field(default_factory=Show)


@dataclass(frozen=True)
class RunJob:
    """Holds everything that a run needs, read and checked.

    Attributes:
        name: Name of the recipe, for the report.
        source: Folder or hub id of the source.
        model: The source, read for planning.
        plan: Plan of the folded model.
        stages: Healing stages of the folded model.
        train: Text for healing and calibration.
        held_out: Text for evaluation.
        baselines: Names of the baselines.
        settings: Settings, with the number of evaluated tokens.
        notes: Lines about the data, such as the warning about a single kind of text.
    """

    name: str
    source: Source
    model: SourceModel
    plan: Draft
    stages: tuple[HealStage, ...]
    train: DataSource
    held_out: DataSource
    baselines: tuple[str, ...]
    settings: RunSettings
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Returns the healing tokens of one arm."""
        return sum(stage.tokens for stage in self.stages)


def read_job(
    source: str | Path,
    recipe: RecipeLike,
    data: Data,
    held_out: Data | None,
    settings: RunSettings,
    options: RunOptions,
) -> RunJob:
    """Reads and checks everything that a run needs, without writing a file; arguments and errors as for `run`."""
    choose_device(settings.device)
    loaded = load_recipe(recipe, options.overrides)
    located = locate(source)
    model = read_source_model(located)
    plan = plan_model(model, loaded, options.allow_larger)
    located.ignore_tensors = tuple((each.name, each.reason) for each in plan.recipe.ignore_tensors)
    stages = settings.stages(plan.recipe)
    positions = plan.blueprint.arch.max_position_embeddings
    for stage in stages:
        if stage.context is not None and stage.context > positions:
            raise HealError(f"heal.context: must be at most the model's {positions} positions (got {stage.context})")
    opened = open_text(data)
    train, test = split(opened) if held_out is None else (opened, open_text(held_out))
    price = describe_one_kind(opened, "healing")
    if settings.eval_tokens is None:
        settings = replace(settings, eval_tokens=choose_eval_tokens(sum(stage.tokens for stage in stages)))
    baselines = default_baselines(plan) if settings.baselines is None else settings.baselines
    notes = () if price is None else (price,)
    return RunJob(_name(recipe), located, model, plan, stages, train, test, baselines, settings, notes)


def choose_eval_tokens(heal_tokens: int) -> int:
    """Returns the default number of held-out tokens, so that scoring five models takes less time than healing one.

    Args:
        heal_tokens: Healing tokens of one arm; 0: no healing.
    """
    if not heal_tokens:
        return MOST_EVAL_TOKENS // EVAL_SHARE
    return min(MOST_EVAL_TOKENS, max(FEWEST_EVAL_TOKENS, heal_tokens // EVAL_SHARE))


def _name(recipe: RecipeLike) -> str:
    is_built_in = isinstance(recipe, str) and "/" not in recipe and not recipe.endswith((".yaml", ".yml"))
    return recipe if isinstance(recipe, str) and is_built_in else "folded"
