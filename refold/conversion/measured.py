"""Measurements that settle a draft: layers to drop, moments that weight errors, and ranks."""

from pathlib import Path
from typing import NamedTuple

import torch

from refold.blueprint.schema import Blueprint
from refold.calibration.calibration import pack_calibration
from refold.calibration.curves import LinearSources, linear_sources, measure_linears
from refold.calibration.frames import FramedMoments, FramedPieces
from refold.calibration.influence import measure_influence
from refold.calibration.layers import SourceLayers
from refold.calibration.moments import MomentStore, measure_moments
from refold.checkpoint.reader import CheckpointReader
from refold.conversion.alignment import align_layers
from refold.conversion.progress import DoneReport, Progress
from refold.data.packing import PackedSequence
from refold.data.readers import DataSource
from refold.errors import FolderError, RecipeError
from refold.modeling.load import choose_device, load_tokenizer
from refold.planning.allocation import Choice, allocate, keep_energy
from refold.planning.build import identity_blueprint
from refold.planning.factors import (
    linear_budget,
    lora_parameters,
    stored_linears,
    stored_parameters,
    with_multiples,
)
from refold.planning.plan import Draft, Plan, StackPlan, plan_model, replan
from refold.recipe.load import RecipeLike, load_recipe
from refold.recipe.recipe import RankEnergy, RankShare, Recipe
from refold.sources.pieces import PieceReader
from refold.sources.source_model import SourceModel, read_source_model


class Measured(NamedTuple):
    """A settled plan, with the source and the moments that its fits read.

    Attributes:
        plan: With measured drops and ranks.
        layers: The source, tied layers in their common frame.
        store: Moments, in the same frames; None where errors are not weighted.
    """

    plan: Plan
    layers: SourceLayers
    store: MomentStore | None


def require_calibration(plan: StackPlan, has_text: bool, has_moments: bool = False) -> None:
    """Checks that a recipe whose drops, weights or fits depend on text has text, or moments measured on text.

    Raises:
        RecipeError: The recipe needs text and there is none.
    """
    recipe = plan.recipe
    if recipe.fits_in_sequence and has_moments and not has_text:
        raise RecipeError(
            "calibration.order: calibration text is required for sequential, moments are not enough (got none); give "
            "--calibration FILE (in Python: calibration=[FILE])"
        )
    if recipe.needs_text and not (has_text or has_moments):
        raise RecipeError(
            f"weight: calibration text is required for `weight: {recipe.weight}` (got none); give --calibration FILE "
            f"(in Python: calibration=[FILE]), or set relax.weight and factor.weight to none"
        )
    if recipe.needs_influence and plan.influence is None and not has_text:
        raise RecipeError(
            "drop: measurements or calibration text are required for `by: similarity` (got neither); give "
            "--measurements DIR of `refold analyse` or --calibration FILE (in Python: measurements=, calibration=), or "
            "set by to even"
        )


def reads_text(plan: StackPlan) -> bool:
    """Tells whether a plan measures something on calibration text."""
    return plan.recipe.needs_text or _measures_influence(plan, has_text=True)


def expect_measurements(plan: StackPlan, has_text: bool, progress: Progress) -> None:
    """Sets the steps of the measurements that a plan waits for."""
    num_layers = plan.blueprint.arch.num_layers
    progress.expect("influence", num_layers if _measures_influence(plan, has_text) else 0)
    passes = 1 if plan.starts.weight == "activations" else 2
    progress.expect("moments", passes * num_layers if plan.recipe.needs_text else 0)
    progress.expect("ranks", len(list(stored_linears(plan.blueprint))) if plan.recipe.measures_ranks else 0)


def reads_weights(plan: StackPlan, has_text: bool) -> bool:
    """Tells whether a plan needs the weights of its source, not only its config."""
    return plan.starts.weights == "source" or _measures_influence(plan, has_text)


def _measures_influence(plan: StackPlan, has_text: bool) -> bool:
    return has_text and plan.recipe.measures_influence and plan.influence is None


def measure_plan(
    draft: Draft,
    layers: SourceLayers,
    text: DataSource | None,
    folder: Path,
    moments: Path | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Makes the measurements that a draft waits for, and settles it.

    Args:
        draft: The plan; ranks and drops that follow from measurement are even so far.
        layers: Its source, on the device that measures.
        text: Calibration text.
        folder: An existing folder for moments. A moment has the square of the width of a linear's inputs or outputs.
        moments: A folder that `keep_moments` filled, used instead of the text.
        progress: Progress of the phases `influence`, `moments` and `ranks`.

    Raises:
        DataError: The text is too short or cannot be read.
        RecipeError: The budget is below the smallest ranks.
        SourceError: The moments are another source's.
    """
    recipe, progress = draft.recipe, progress or Progress()
    measures_influence = _measures_influence(draft, text is not None)
    packed = None
    if measures_influence or (recipe.needs_text and moments is None):
        assert text is not None
        packed = pack_text(layers.model, text, recipe)
    if measures_influence:
        assert packed is not None
        influence = measure_influence(layers, packed, progress=progress.of("influence"))
        draft = plan_model(layers.model, recipe, allow_larger=True, influence=influence)
    store = None
    if recipe.needs_text and moments is not None:
        store = MomentStore(moments)
        store.check(layers.model.source.fingerprint(), with_gradients=recipe.weight == "fisher")
    elif recipe.needs_text:
        assert packed is not None
        store = MomentStore(folder)
        _measure_moments(layers, packed, store, folder, recipe, progress.of("moments"))
    if draft.starts.align != "none":
        frames = align_layers(draft.blueprint, draft.starts.align, layers.pieces, layers.device)
        layers = layers.with_pieces(FramedPieces(layers.pieces, frames))
        store = None if store is None else FramedMoments(store, frames)
    plan = _measure_ranks(draft, layers, store, progress.of("ranks")) if recipe.measures_ranks else draft.settle()
    return Measured(plan, layers, store)


def _measure_ranks(draft: Draft, layers: SourceLayers, store: MomentStore | None, progress: DoneReport) -> Plan:
    is_joint = draft.starts.lora == "joint"
    with torch.inference_mode():
        linears = measure_linears(
            measured_groups(draft), draft.recipe.weight, is_joint, layers.pieces, store, layers.device, progress
        )
    chosen = with_multiples(_choose(draft, linears), draft.recipe)
    return replan(draft, layers.model, chosen).settle()


def keep_moments(source: str | Path, recipe: RecipeLike, text: DataSource, folder: Path, device: str = "cpu") -> None:
    """Measures the moments that a recipe needs and stores them in a new folder, for several conversions.

    Args:
        source: Folder or hub id.
        recipe: `weight` selects the moments, `calibration` the amount of text.
        text: Calibration text.
        folder: A folder that does not exist yet.
        device: Device that runs layers.

    Raises:
        FolderError: The folder exists.
        RecipeError, SourceError, DataError: As `convert`.
    """
    loaded, device = load_recipe(recipe).resolved(), str(choose_device(device))
    model = read_source_model(source)
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise FolderError(f"{folder}: a new folder for moments is required (it is there); choose another") from None
    with CheckpointReader(model.source.fetch()) as reader:
        pieces, store = PieceReader(model, reader), MomentStore(folder)
        _measure_moments(SourceLayers(model, pieces, device), pack_text(model, text, loaded), store, folder, loaded)
    store.sign(model.source.fingerprint(), loaded.calibration.tokens, text.name)


def pack_text(model: SourceModel, text: DataSource, recipe: Recipe) -> PackedSequence:
    """Draws the number of tokens of calibration text that a recipe asks for.

    Raises:
        DataError: The text is too short or cannot be read.
        SourceError: The source has no tokenizer.
    """
    length = min(recipe.calibration.context, model.arch.max_position_embeddings)
    return pack_calibration(
        text,
        load_tokenizer(model.source),
        sequence_length=length,
        num_fit=0,
        num_held_out=max(1, recipe.calibration.tokens // length),
        seed=recipe.seed,
        vocab_size=model.arch.vocab_size,
    ).held_out


def _measure_moments(
    layers: SourceLayers,
    packed: PackedSequence,
    store: MomentStore,
    scratch: Path,
    recipe: Recipe,
    progress: DoneReport = lambda done: None,
) -> None:
    gradients = recipe.weight == "fisher"
    measure_moments(layers, packed, store, scratch, with_gradients=gradients, seed=recipe.seed, progress=progress)


def measured_groups(plan: StackPlan) -> list[LinearSources]:
    """Returns the stored linears whose ranks are measured: those with the same role as in the source."""
    found = [
        linear_sources(plan.blueprint, plan.starts, pool, part, linear)
        for pool, part, linear, _ in stored_linears(plan.blueprint)
    ]
    return [group for group in found if group is not None and group.is_native]


def _choose(plan: StackPlan, linears: list) -> Blueprint:
    recipe, blueprint = plan.recipe, plan.blueprint
    rank = None if recipe.lora is None else recipe.lora.rank
    if isinstance(rank, RankEnergy):
        return keep_energy(linears, blueprint, rank.energy)
    source = identity_blueprint(blueprint.arch)
    measures_loras = isinstance(rank, RankShare) and rank.split == "measured"
    measured = {(each.pool, each.part, each.linear) for each in linears}
    # Linears that are not measured keep their ranks.
    paid = lora_parameters(blueprint, skipped=measured if measures_loras else ())
    if recipe.factor is None:
        assert isinstance(rank, RankShare)
        assert rank.parameters is not None
        budget = int(rank.parameters * plan.cost.source.non_embedding_parameters) - paid
        budget += sum(each.whole for each in linears)
    else:
        paid += sum(
            stored_parameters(blueprint, each) for each in stored_linears(blueprint) if each[:3] not in measured
        )
        budget = linear_budget(source, recipe.factor.parameters) - paid
    if budget <= 0:
        raise RecipeError(
            f"factor.parameters: a share above what is not factorised is required (got {recipe.factor.parameters:g}, "  # pyright: ignore[reportOptionalMemberAccess]
            f"{-budget:,} parameters too few); raise it"
        )
    return allocate(linears, blueprint, Choice(factors=recipe.factor is not None, loras=measures_loras), budget)
