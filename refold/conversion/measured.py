"""What a plan leaves to measurement: what to drop, moments its fits are weighed by, ranks that follow from weights."""

from collections.abc import Callable
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
from refold.data.packing import PackedSequence
from refold.data.readers import DataSource
from refold.errors import FolderError, RecipeError
from refold.modeling.load import choose_device, load_tokenizer
from refold.planning.allocation import Choice, allocate, keep_energy
from refold.planning.build import identity_blueprint
from refold.planning.factors import linear_budget, lora_parameters, stored_linears, stored_parameters
from refold.planning.plan import Draft, Plan, StackPlan, plan_model, replan
from refold.recipe.load import RecipeLike, load_recipe
from refold.recipe.recipe import RankEnergy, RankShare, Recipe
from refold.sources.pieces import PieceReader
from refold.sources.source_model import SourceModel, read_source_model

Report = Callable[[int], None]


class Measured(NamedTuple):
    """A settled plan, and the readers that carry it out.

    Attributes:
        plan: With measured drops and ranks.
        pieces: Reads the source, tied layers in their common frame.
        store: Moments, in the same frames; None where errors are not weighed.
    """

    plan: Plan
    pieces: PieceReader
    store: MomentStore | None


def require_calibration(plan: StackPlan, has_text: bool, has_moments: bool = False) -> None:
    """Checks that there is text where something is chosen or weighed by what the source does on some.

    Raises:
        RecipeError: There is none.
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
    """Says whether a plan leaves something to measure on calibration text where there is some."""
    return plan.recipe.needs_text or _measures_influence(plan, has_text=True)


def measuring_steps(plan: StackPlan, has_text: bool) -> int:
    """Returns how many steps of progress measuring takes."""
    layers = plan.blueprint.arch.num_layers
    steps = layers if _measures_influence(plan, has_text) else 0
    if plan.recipe.needs_text:
        steps += layers if plan.starts.weight == "activations" else 2 * layers
    return steps + (len(list(stored_linears(plan.blueprint))) if plan.recipe.measures_ranks else 0)


def reads_weights(plan: StackPlan, has_text: bool) -> bool:
    """Whether a plan cannot be carried out on a source of which only the config is there."""
    return plan.starts.weights == "source" or _measures_influence(plan, has_text)


def _measures_influence(plan: StackPlan, has_text: bool) -> bool:
    return has_text and plan.recipe.measures_influence and plan.influence is None


def measure_plan(
    draft: Draft,
    model: SourceModel,
    pieces: PieceReader,
    text: DataSource | None,
    folder: Path,
    device: str = "cpu",
    progress: Report = lambda done: None,
    moments: Path | None = None,
) -> Measured:
    """Makes the measurements that a draft waits for, and settles it.

    Args:
        draft: With even ranks and drops where those follow from measurement.
        model: Its source.
        pieces: Reads the source.
        text: Calibration text.
        folder: An existing folder for moments; as large as the squares of all linears' sides together.
        device: Where layers run and matrices are decomposed.
        progress: Told how many of `measuring_steps` are done.
        moments: A folder `keep_moments` filled, instead of the text.

    Returns:
        The settled plan, with the reader and the moments that carry it out.

    Raises:
        DataError: The text is too short or cannot be read.
        RecipeError: The budget holds not even the smallest ranks.
        SourceError: The moments are another source's.
    """
    recipe, store, done = draft.recipe, None, 0
    measures_influence = _measures_influence(draft, text is not None)
    layers = SourceLayers(model, pieces, device)
    packed = None
    if measures_influence or (recipe.needs_text and moments is None):
        assert text is not None
        packed = pack_text(model, text, recipe)
    if measures_influence:
        assert packed is not None
        influence = measure_influence(layers, packed, progress=progress)
        draft = plan_model(model, recipe, allow_larger=True, influence=influence)
        done = model.arch.num_layers
    if recipe.needs_text:
        before = done
        store = MomentStore(folder if moments is None else moments)
        if moments is not None:
            store.check(model.source.fingerprint(), with_gradients=recipe.weight == "fisher")
        else:
            assert packed is not None
            _measure_moments(layers, packed, store, folder, recipe, lambda count: progress(before + count))
        done += model.arch.num_layers * (2 if recipe.weight == "fisher" else 1)
    if draft.starts.align != "none":
        frames = align_layers(draft.blueprint, draft.starts.align, pieces, device)
        pieces = FramedPieces(pieces, frames)
        store = None if store is None else FramedMoments(store, frames)
    if not recipe.measures_ranks:
        return Measured(draft.settle(), pieces, store)
    groups = measured_groups(draft)
    with torch.inference_mode():
        linears = measure_linears(
            groups,
            recipe.weight,
            draft.starts.lora == "joint",
            pieces,
            store,
            device,
            lambda count: progress(done + count),
        )
    return Measured(replan(draft, model, _choose(draft, linears)).settle(), pieces, store)


def keep_moments(source: str | Path, recipe: RecipeLike, text: DataSource, folder: Path, device: str = "cpu") -> None:
    """Measures the moments a recipe needs into a new folder, for several conversions to use.

    Args:
        source: Folder or hub id.
        recipe: Says in `weight` and `calibration` what is measured, on how much text.
        text: Calibration text.
        folder: A folder that is not there yet.
        device: Where layers run.

    Raises:
        FolderError: The folder is there.
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
    """Draws as many tokens of calibration text as a recipe asks for.

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
    progress: Report = lambda done: None,
) -> None:
    gradients = recipe.weight == "fisher"
    measure_moments(layers, packed, store, scratch, with_gradients=gradients, seed=recipe.seed, progress=progress)


def measured_groups(plan: StackPlan) -> list[LinearSources]:
    """Returns the stored linears whose ranks are measured: those that do what they did in the source."""
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
    # What is not measured keeps the ranks it has.
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
