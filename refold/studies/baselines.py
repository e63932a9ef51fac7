"""The baselines with which a run compares its model, each one entry of `BASELINES`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refold.blueprint.integers import COMMON_SCHEMES, find_scheme
from refold.blueprint.quantisation import quantised_bytes
from refold.checkpoint.locate import Source
from refold.errors import RecipeError
from refold.planning.build import identity_blueprint
from refold.planning.factors import stored_share
from refold.planning.plan import Draft, StackPlan, plan_model, replan
from refold.recipe.drop import BlockDrop, Drop
from refold.recipe.heal import HealStage
from refold.recipe.low_rank import Factor
from refold.recipe.recipe import LoraRelax, RankEnergy, Recipe
from refold.sources.source_model import SourceModel
from refold.suggest import must_be_one_of

ALIGNMENTS = frozenset({"mixer_outputs", "hidden_states", "attention_matrices"})
"""Objectives that have no effect on a model with the layers of the source."""


@dataclass(frozen=True)
class BaselineJob:
    """Holds the inputs of a baseline.

    Attributes:
        source: Source of the run.
        model: The source, read for planning.
        plan: Plan of the folded model with which the baseline is compared.
        convert: Carries out a plan in the baseline's folder, if this was not done before, and returns the model folder.
    """

    source: Source
    model: SourceModel
    plan: StackPlan
    convert: Callable[[Draft], Path]


@dataclass(frozen=True)
class Baseline:
    """Describes a baseline. It is evaluated like the folded model and, unless it is quantised, healed like it.

    Attributes:
        description: Name in the report line.
        start: Returns the folder or hub id of the model before healing; raises RecipeError if this baseline does not
            exist for the folded model.
        needs_healing: Whether the baseline is useless unhealed: a run without healing drops it.
        scheme: Returns the scheme that quantises its linears for the evaluation; None: they are not quantised.
    """

    description: str
    start: Callable[[BaselineJob], str | Path | Source]
    needs_healing: bool
    scheme: Callable[[StackPlan], str] | None = None


def pruned_recipe(plan: StackPlan) -> Recipe:
    """Returns a recipe for depth pruning that keeps as many layers as fit into the parameters of a plan's target."""
    budget = plan.cost.target.non_embedding_parameters
    return Recipe(drop=Drop(block=BlockDrop(parameters=budget, by="auto")))


def lowrank_recipe(plan: StackPlan) -> Recipe:
    """Returns a recipe that stores every linear as two low-rank factors, with the linear parameters of a plan's target.

    The method is SVD-LLM (arXiv 2403.07378).
    """
    share = stored_share(plan.blueprint, identity_blueprint(plan.blueprint.arch))
    return Recipe(factor=Factor(parameters=share), calibration=plan.recipe.calibration)


def scratch_recipe(plan: StackPlan) -> Recipe:
    """Returns a recipe for the architecture of a plan's target with fresh weights, without its measured ranks."""
    recipe = plan.recipe
    # These keys are dropped, so that planning chooses defaults for fresh weights: no fit, and no LoRA from an SVD.
    fold = recipe.fold and recipe.fold.model_copy(update={"init": None, "align": "none", "scale": "none"})
    relax = recipe.lora.model_copy(update={"init": None}) if recipe.lora else recipe.relax
    if isinstance(relax, LoraRelax) and isinstance(relax.rank, RankEnergy):
        relax = relax.model_copy(update={"rank": _largest_ranks(plan) or 0})
    calibration = recipe.calibration.model_copy(update={"order": "at_once"})
    fields = {name: getattr(recipe, name) for name in Recipe.model_fields}
    changes = {"weights": "fresh", "fold": fold, "relax": relax, "calibration": calibration}
    return Recipe.model_construct(**{**fields, **changes})


def scratch_plan(model: SourceModel, plan: StackPlan) -> Draft:
    """Plans the architecture of a plan's target, with its measured ranks, with fresh weights."""
    made = plan_model(model, scratch_recipe(plan), allow_larger=True, influence=plan.influence)
    parts = {
        pool: tuple(
            part.model_copy(update={"sources": fresh.sources})
            for part, fresh in zip(getattr(plan.blueprint, pool), getattr(made.blueprint, pool), strict=True)
        )
        for pool in ("mixers", "mlps")
    }
    return replan(made, model, plan.blueprint.model_copy(update=parts), outdated="ranks")


def _largest_ranks(plan: StackPlan) -> dict[str, int]:
    found: dict[str, int] = {}
    for depth in plan.blueprint.depths:
        for name, rank in depth.ranks.items():
            found[name] = max(rank, found.get(name, 0))
    return found


def fitting_scheme(plan: StackPlan) -> str:
    """Returns the most precise common scheme whose source is at most as large as the plan's target, or the smallest."""
    source, costs = identity_blueprint(plan.blueprint.arch), plan.cost
    dtype_bytes = costs.source.weight_bytes // costs.source.parameters
    sizes = {name: quantised_bytes(source, dtype_bytes, find_scheme(name)) for name in COMMON_SCHEMES}
    fitting = (name for name, size in sizes.items() if size <= costs.target.weight_bytes)
    return next(fitting, min(sizes, key=lambda name: sizes[name]))


def whole_model_stages(stages: Sequence[HealStage]) -> tuple[HealStage, ...]:
    """Returns stages with the same tokens, batches and schedules that train all weights, for baselines.

    Settings that freeze, thaw or select weights are dropped. Objectives that only align activations are replaced by the
    default, distillation. The learning rate of a stage that trained only some weights becomes the default.
    """
    return tuple(_for_all(stage) for stage in stages)


def _for_all(stage: HealStage) -> HealStage:
    changes: dict[str, Any] = {"train": ("all",), "freeze": (), "rates": {}, "thaw": None}
    if set(stage.objective.chosen()) <= ALIGNMENTS:
        changes["objective"] = HealStage.model_fields["objective"].default
    if stage.train != ("all",) or "objective" in changes:
        changes["learning_rate"] = HealStage.model_fields["learning_rate"].default
    return stage.model_copy(update=changes)


def default_baselines(plan: StackPlan) -> tuple[str, ...]:
    """Returns the default baselines: `pruned` and `quantised`, or `scratch` if the target is as large as its source."""
    costs = plan.cost
    is_smaller = costs.target.non_embedding_parameters < costs.source.non_embedding_parameters
    return ("pruned", "quantised") if is_smaller else ("scratch",)


def _start_pruned(job: BaselineJob) -> Path:
    costs = job.plan.cost
    if costs.target.non_embedding_parameters >= costs.source.non_embedding_parameters:
        raise RecipeError("baseline pruned: a target smaller than its source is required; take scratch")
    return job.convert(plan_model(job.model, pruned_recipe(job.plan)))


def _start_lowrank(job: BaselineJob) -> Path:
    recipe = lowrank_recipe(job.plan)
    assert recipe.factor is not None
    if recipe.factor.parameters is not None and recipe.factor.parameters >= 1:
        raise RecipeError("baseline lowrank: fewer linear weights than the source's are required; take scratch")
    return job.convert(plan_model(job.model, recipe))


def _start_source(job: BaselineJob) -> Source:
    return job.source


def _start_scratch(job: BaselineJob) -> Path:
    # The size is that of the folded model, which was accepted.
    return job.convert(scratch_plan(job.model, job.plan))


BASELINES = {
    "pruned": Baseline("pruned to the same size", _start_pruned, needs_healing=False),
    "lowrank": Baseline("low rank at the same size", _start_lowrank, needs_healing=False),
    "quantised": Baseline("source", _start_source, needs_healing=False, scheme=fitting_scheme),
    "trained-source": Baseline("source trained alike", _start_source, needs_healing=True),
    "scratch": Baseline("the same from scratch", _start_scratch, needs_healing=True),
}


def require_baseline(name: str, further: Sequence[str] = ()) -> None:
    """Checks the name of a baseline.

    Raises:
        RecipeError: The name is neither that of a baseline nor one of `further`.
    """
    known = (*BASELINES, *further)
    if name not in known:
        raise RecipeError(f"baseline: {must_be_one_of(name, known)}")


def read_baselines(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Reads the names of baselines from the user: `none` gives no baseline, and no name gives None, the default.

    Raises:
        RecipeError: A baseline is unknown.
    """
    if not names:
        return None
    for name in names:
        require_baseline(name, further=("none",))
    return tuple(name for name in BASELINES if name in names)
