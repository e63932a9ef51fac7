"""The rivals a run measures its model against: each is one entry that says where it starts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refold.blueprint.quantisation import SCHEMES, quantised_bytes
from refold.checkpoint.locate import Source
from refold.errors import RecipeError
from refold.planning.build import identity_blueprint
from refold.planning.factors import stored_share
from refold.planning.plan import Draft, StackPlan, plan_model, replan
from refold.recipe.drop import BlockDrop, Drop
from refold.recipe.heal import HealStage
from refold.recipe.recipe import Factor, LoraRelax, RankEnergy, Recipe
from refold.sources.source_model import SourceModel
from refold.suggest import must_be_one_of

ALIGNMENTS = frozenset({"mixer_outputs", "hidden_states", "attention_matrices"})
"""Objectives that say nothing to a model whose layers are the source's own."""


@dataclass(frozen=True)
class BaselineJob:
    """What a baseline can start from.

    Attributes:
        source: Of the run.
        model: The source, read for planning.
        plan: Of the folded model it stands beside.
        convert: Carries out a plan in the baseline's own folder, once, and returns the model folder.
    """

    source: Source
    model: SourceModel
    plan: StackPlan
    convert: Callable[[Draft], Path]


@dataclass(frozen=True)
class Baseline:
    """A rival of the folded model, evaluated like it and, unless it is quantised, healed like it.

    Attributes:
        description: For the report line.
        start: Returns the folder or hub id that healing starts from; raises RecipeError where there is no such rival of
            this model.
        needs_healing: Whether it says nothing unhealed: a run without healing leaves it out.
        scheme: Names the scheme to which its linears are quantised for the evaluation; None: they are not.
    """

    description: str
    start: Callable[[BaselineJob], str | Path | Source]
    needs_healing: bool
    scheme: Callable[[StackPlan], str] | None = None


def pruned_recipe(plan: StackPlan) -> Recipe:
    """Depth pruning that keeps as many whole layers as fit into a plan's target, the most important if measured."""
    budget = plan.cost.target.non_embedding_parameters
    return Recipe(drop=Drop(block=BlockDrop(parameters=budget, by="auto")))


def lowrank_recipe(plan: StackPlan) -> Recipe:
    """Every linear as two factors of lower rank, as many parameters as the linears of a plan's target (SVD-LLM,
    arXiv 2403.07378)."""
    share = stored_share(plan.blueprint, identity_blueprint(plan.blueprint.arch))
    return Recipe(factor=Factor(parameters=share), calibration=plan.recipe.calibration)


def scratch_recipe(plan: StackPlan) -> Recipe:
    """What makes the architecture of a plan's target with fresh weights, but for ranks that were measured."""
    recipe = plan.recipe
    # Left out, so that planning takes what suits fresh weights: nothing is fitted to them, no LoRA starts from an SVD.
    fold = recipe.fold and recipe.fold.model_copy(update={"init": None, "align": "none", "scale": "none"})
    relax = recipe.lora.model_copy(update={"init": None}) if recipe.lora else recipe.relax
    if isinstance(relax, LoraRelax) and isinstance(relax.rank, RankEnergy):
        relax = relax.model_copy(update={"rank": _largest_ranks(plan) or 0})
    calibration = recipe.calibration.model_copy(update={"order": "at_once"})
    fields = {name: getattr(recipe, name) for name in Recipe.model_fields}
    changes = {"weights": "fresh", "fold": fold, "relax": relax, "calibration": calibration}
    return Recipe.model_construct(**{**fields, **changes})


def scratch_plan(model: SourceModel, plan: StackPlan) -> Draft:
    """Plans the architecture of a plan's target, with the very ranks that were measured for it, with fresh weights."""
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
    """The most precise scheme that makes a plan's source no larger than its target; if none does, the smallest."""
    source, costs = identity_blueprint(plan.blueprint.arch), plan.cost
    dtype_bytes = costs.source.weight_bytes // costs.source.parameters
    sizes = {name: quantised_bytes(source, dtype_bytes, scheme) for name, scheme in SCHEMES.items()}
    fitting = (name for name, size in sizes.items() if size <= costs.target.weight_bytes)
    return next(fitting, min(sizes, key=lambda name: sizes[name]))


def whole_model_stages(stages: Sequence[HealStage]) -> tuple[HealStage, ...]:
    """Returns stages of the same tokens, batches and schedules in which everything trains, as it does in a rival.

    What freezes, thaws or trains parts is left out; where only activations were aligned, the source's distribution is
    learned instead. A learning rate that was meant for parts becomes the default.
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
    """Returns the rivals nobody named: depth pruning and quantisation, or for a target as large as its source the same
    from scratch."""
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
    if recipe.factor.parameters >= 1:
        raise RecipeError("baseline lowrank: fewer linear weights than the source's are required; take scratch")
    return job.convert(plan_model(job.model, recipe))


def _start_source(job: BaselineJob) -> Source:
    return job.source


def _start_scratch(job: BaselineJob) -> Path:
    # As large as the folded model, which was accepted.
    return job.convert(scratch_plan(job.model, job.plan))


BASELINES = {
    "pruned": Baseline("pruned to the same size", _start_pruned, needs_healing=False),
    "lowrank": Baseline("low rank at the same size", _start_lowrank, needs_healing=False),
    "quantised": Baseline("source", _start_source, needs_healing=False, scheme=fitting_scheme),
    "trained-source": Baseline("source trained alike", _start_source, needs_healing=True),
    "scratch": Baseline("the same from scratch", _start_scratch, needs_healing=True),
}


def require_baseline(name: str, further: Sequence[str] = ()) -> None:
    """Checks a name.

    Raises:
        RecipeError: It is neither a baseline's nor one of `further`.
    """
    known = (*BASELINES, *further)
    if name not in known:
        raise RecipeError(f"baseline: {must_be_one_of(name, known)}")


def read_baselines(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Reads the baselines a user names, `none` for none; nothing named: None, for the default.

    Raises:
        RecipeError: An unknown one.
    """
    if not names:
        return None
    for name in names:
        require_baseline(name, further=("none",))
    return tuple(name for name in BASELINES if name in names)
