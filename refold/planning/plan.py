"""Plans: the result of a recipe on a source, made before any weight is read, and their file plan.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from refold.blueprint.cost import Cost, cost
from refold.blueprint.origins import Initialisation
from refold.blueprint.quantisation import without_schemes
from refold.blueprint.schema import Blueprint, depth_factors, depth_linears
from refold.checkpoint.headers import DTYPE_BYTES
from refold.checkpoint.locate import Source
from refold.errors import RecipeError, RefoldError
from refold.families.arch import Frozen
from refold.planning.approximation import Approximation, stored_maps
from refold.planning.build import build_blueprint, identity_blueprint
from refold.planning.lines import PlanLine, plan_lines
from refold.planning.notes import NoteKind, Notes, notes
from refold.planning.widths import Widths
from refold.recipe.load import RecipeLike, built_in_recipes, load_recipe
from refold.recipe.recipe import Recipe, ResolvedRecipe
from refold.sources.measurements import Influence, read_measurements
from refold.sources.source_model import SourceModel, SourceRecord, read_source_model, record_source

PLAN_FORMAT = 1
"""Version of the format of plan.json."""
SUMMARY_CONTEXT = 8192


class CostPair(Frozen):
    """The costs of the source and of the target."""

    source: Cost
    target: Cost


class SummaryRow(NamedTuple):
    """One quantity of source and target."""

    quantity: str
    source: int
    target: int

    @property
    def ratio(self) -> float | None:
        """Target divided by source; None if the source's quantity is 0."""
        return self.target / self.source if self.source else None


class StackPlan(Frozen):
    """A source, a resolved recipe, and the stack that the recipe makes of the source."""

    format: Literal[1] = PLAN_FORMAT
    source: SourceRecord
    recipe: ResolvedRecipe
    starts: Initialisation
    blueprint: Blueprint
    cost: CostPair
    lines: tuple[PlanLine, ...]
    notes: Notes
    influence: Influence | None = None
    """The measured influence that decided which layers and parts are dropped; None: nothing was measured."""

    def summary(self, context: int = SUMMARY_CONTEXT) -> list[SummaryRow]:
        """Returns the costs of source and target by quantity; cache and FLOPs are for `context` tokens."""
        source, target = self.cost.source, self.cost.target
        return [
            SummaryRow("parameters", source.parameters, target.parameters),
            SummaryRow("non_embedding_parameters", source.non_embedding_parameters, target.non_embedding_parameters),
            SummaryRow("weight_bytes", source.weight_bytes, target.weight_bytes),
            SummaryRow("cache_bytes", source.cache_bytes(context), target.cache_bytes(context)),
            SummaryRow("flops", source.flops(context), target.flops(context)),
        ]

    @property
    def dtype(self) -> str:
        """Torch name of the dtype of the target's floats."""
        return self.recipe.dtype or self.source.dtype

    @property
    def calibration(self) -> Literal["required", "useful", "unused"]:
        """Use of calibration text.

        `required`: linears are fitted to it, or tokens are counted in it; `useful`: drops or feature maps can use it.
        """
        if self.recipe.needs_text or self.recipe.replaces or self.recipe.counts_tokens:
            return "required"
        has_use = self.recipe.measures_influence or stored_maps(self.blueprint, self.starts)
        return "useful" if has_use else "unused"

    @property
    def needs_healing(self) -> bool:
        """Whether the target computes another function than its source."""
        return self.starts.weights == "fresh" or not all(
            _equals_source(self.blueprint, self.starts, index) for index in range(self.blueprint.num_depths)
        )


class Plan(StackPlan):
    """A settled plan, whose blueprint depends on no further measurement."""

    kept_energy: Mapping[str, float] = Field(default_factory=dict)
    """After conversion, by `depths.<d>.<linear>`: the share of the residual's energy that the LoRA restores."""
    factor_energy: Mapping[str, float] = Field(default_factory=dict)
    """After conversion, by `mixers.<p>.<linear>` or `mlps.<p>.<linear>`: the share of the weight's energy, in the error
    metric, that the stored factors hold."""
    approximation: Mapping[str, Approximation] = Field(default_factory=dict)
    """After conversion, by `depths.<d>`: the error of feature maps against the softmax of the source's layer."""


class Draft(StackPlan):
    """A plan made from config and headers, in which ranks and drops that need a measurement are still even."""

    @property
    def pending(self) -> Notes:
        """The notes that name a missing measurement; empty: the draft can be settled as it is."""
        return tuple(note for note in self.notes if note.kind == "pending")

    def with_floats(self) -> "Draft":
        """Returns the draft without quantisation."""
        recipe = self.recipe.model_copy(update={"quantise": None})
        return self.model_copy(update={"recipe": recipe, "blueprint": without_schemes(self.blueprint)})

    def settle(self) -> Plan:
        """Returns the plan with the same blueprint: even ranks and drops stay, and their notes become facts."""
        notes = tuple(note.model_copy(update={"kind": "fact"}) if note in self.pending else note for note in self.notes)
        fields = {name: getattr(self, name) for name in StackPlan.model_fields}
        return Plan.model_construct(**{**fields, "notes": notes})


@dataclass(frozen=True)
class PlannedRecipe:
    """A built-in recipe on a source: its plan, or the error."""

    name: str
    description: str
    plan: Draft | None
    error: str | None = None


def plan(
    source: str | Path | Source,
    recipe: RecipeLike = None,
    overrides: Sequence[str] = (),
    allow_larger: bool = False,
    measurements: str | Path | None = None,
) -> Draft:
    """Plans a conversion from `config.json` and safetensors headers alone.

    Args:
        source: Folder or hub id; a folder with only `config.json` can be planned.
        recipe: Built-in name, YAML file, mapping or Recipe; None for the identity.
        overrides: `key.path=value` strings.
        allow_larger: Accept a target that is larger than its source in some quantity and smaller in none.
        measurements: The measurements of the source by `analyse`: the folder, or its `measurements.json`.

    Raises:
        RecipeError: The recipe is invalid, or does not fit the source.
        SourceError: The source is missing, damaged or unknown, a tensor has no place, or the measurements belong to
            another source.
        FolderError: The measurements are missing or damaged.
    """
    loaded, model = load_recipe(recipe, overrides), read_source_model(source)
    return plan_model(model, loaded, allow_larger, read_influence(model, measurements))


def read_influence(model: SourceModel, measurements: str | Path | None) -> Influence | None:
    """Reads the measured influence of a source's layers; None if no measurements are given."""
    return None if measurements is None else read_measurements(measurements, model.source).influence


def plan_all(source: str | Path | Source, measurements: str | Path | None = None) -> list[PlannedRecipe]:
    """Plans every built-in recipe; a recipe that does not fit the source is returned with its error."""
    model = read_source_model(source)
    influence = read_influence(model, measurements)
    planned: list[PlannedRecipe] = []
    for name, description in built_in_recipes().items():
        try:
            planned.append(PlannedRecipe(name, description, plan_model(model, load_recipe(name), False, influence)))
        except RecipeError as error:
            planned.append(PlannedRecipe(name, description, None, str(error)))
    return planned


def plan_model(
    model: SourceModel,
    recipe: Recipe,
    allow_larger: bool = False,
    influence: Influence | None = None,
    widths: Widths | None = None,
) -> Draft:
    """Plans a conversion of a source model, optionally with measured influence and widths; see `plan`."""
    recipe = recipe.resolved()
    influence = influence if recipe.measures_influence else None
    blueprint, starts, said = build_blueprint(model.arch, recipe, influence, widths)
    said = (*notes(model.notes), *said)
    return _assemble(model, recipe, blueprint, starts, said, allow_larger=allow_larger, influence=influence)


def replan(draft: Draft, model: SourceModel, blueprint: Blueprint, outdated: NoteKind = "pending") -> Draft:
    """Returns a draft with another blueprint, such as one with measured ranks.

    Args:
        draft: The draft.
        model: The source of the draft.
        blueprint: The new blueprint.
        outdated: The kind of notes to remove, because they no longer hold.
    """
    made = _assemble(model, draft.recipe, blueprint, draft.starts, (), allow_larger=True, influence=draft.influence)
    kept = tuple(note for note in draft.notes if note.kind != outdated and note not in made.notes)
    return made.model_copy(update={"notes": (*kept, *made.notes)})


def _assemble(
    model: SourceModel,
    recipe: ResolvedRecipe,
    blueprint: Blueprint,
    starts: Initialisation,
    said: Notes,
    *,
    allow_larger: bool,
    influence: Influence | None,
) -> Draft:
    ignored = model.check_tensors(recipe.ignore_tensors)
    if any(part.mixer.softmax_fit is not None for part in blueprint.mixers):
        # Raises if a feature map has to be fitted but its queries or keys are fresh.
        stored_maps(blueprint, starts)
    dtype_bytes = model.dtype_bytes if recipe.dtype is None else DTYPE_BYTES[recipe.dtype]
    costs = CostPair(
        source=cost(identity_blueprint(model.arch), model.dtype_bytes), target=cost(blueprint, dtype_bytes)
    )
    if not allow_larger:
        _require_smaller(costs, model.arch.max_position_embeddings)
    made = Draft(
        source=record_source(model),
        recipe=recipe,
        starts=starts,
        blueprint=blueprint,
        cost=costs,
        lines=plan_lines(blueprint, starts, model.family, model.expected, ignored),
        notes=said,
        influence=influence,
    )
    return made.model_copy(update={"notes": (*said, *notes(_say_aloud(made)))})


def read_plan(path: Path) -> Plan:
    """Reads a plan.json.

    Raises:
        RefoldError: The file cannot be read, or is not a plan.
    """
    try:
        return Plan.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RefoldError(f"{path}: a readable plan is required ({error.strerror}); check the path") from None
    except ValueError as error:
        first = " ".join(str(error).split())[:160]
        raise RefoldError(f"{path}: a plan of format {PLAN_FORMAT} is required ({first}); plan again") from None


def _comparable(costs: Cost, context: int) -> dict[str, int]:
    return {
        "weight bytes": costs.weight_bytes,
        "cache": costs.cache_bytes(context),
        "FLOPs per token": costs.flops(context),
        "FLOPs per token without context": costs.flops(0),
    }


def _require_smaller(costs: CostPair, context: int) -> None:
    source, target = _comparable(costs.source, context), _comparable(costs.target, context)
    larger = [name for name in source if target[name] > source[name]]
    if larger and not any(target[name] < source[name] for name in source):
        name = larger[0]
        raise RecipeError(
            f"recipe: the folded model would be larger than its source ({name} {target[name]:,} > {source[name]:,}) "
            f"and smaller in nothing; lower relax.rank, raise fold.loops, or pass --allow-larger"
        )


def _say_aloud(made: StackPlan) -> list[str]:
    said = []
    context = made.blueprint.arch.max_position_embeddings
    source, target = (_comparable(each, context) for each in (made.cost.source, made.cost.target))
    saved = [name for name in source if target[name] < source[name]]
    if saved == ["weight bytes"]:
        said.append("tying saves only weights: cache and FLOPs are those of the source, or more")
    if made.needs_healing:
        said.append("before healing the model is worse than its source, often unusable")
    return said


def _equals_source(blueprint: Blueprint, starts: Initialisation, index: int) -> bool:
    """Says whether a depth computes the same function as its source layer."""
    depth = blueprint.depths[index]
    if depth.mixer is None or depth.mlp is None or depth.kv or depth.prefix:
        return False
    mixer = blueprint.mixers[depth.mixer]
    if blueprint.keeps_state(index) or depth.window != blueprint.arch.layers[depth.source].window:
        return False
    mlp = blueprint.mlps[depth.mlp]
    if mixer.num_key_value_heads is not None or mlp.intermediate_size is not None:
        return False
    stored = (mixer.sources, mlp.sources)
    if not depth_factors(blueprint, index) and all(sources == (depth.source,) for sources in stored):
        return True
    full = all(depth.ranks.get(name) == min(shape) for name, shape in depth_linears(blueprint, index).items())
    return full and depth.vectors == "own" and starts.lora in ("svd", "joint")
