"""Measurements that settle a draft: layers to drop, moments that weight errors, and ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refold.blueprint.schema import POOLS, Blueprint, Pool
from refold.calibration.calibration import CalibrationText, pack_calibration
from refold.calibration.curves import LinearSources, linear_sources, measure_linears
from refold.calibration.frames import FramedMoments, FramedPieces
from refold.calibration.influence import measure_influence
from refold.calibration.layers import SourceLayers
from refold.calibration.moments import MomentStore, Shrinkage, measure_moments
from refold.calibration.narrowed import NarrowedMoments, NarrowedPieces
from refold.calibration.replaced_weights import (
    MapPlan,
    MeasuredMap,
    ReplacedMoments,
    ReplacedPieces,
    measure_replacements,
)
from refold.calibration.shrinkage import choose_shrinkage, number_folds
from refold.checkpoint.reader import CheckpointReader
from refold.conversion.alignment import align_layers
from refold.conversion.progress import DoneReport, Progress
from refold.conversion.removals import RemovalFinder, Removals, keep_units, measured_parts
from refold.data.packing import PackedSequence
from refold.data.readers import DataSource
from refold.errors import FolderError, RecipeError
from refold.modeling.load import choose_device, load_tokenizer
from refold.nn.processor import fast_float32
from refold.planning.allocation import Choice, allocate, keep_energy
from refold.planning.build import identity_blueprint
from refold.planning.factors import (
    linear_budget,
    lora_parameters,
    stored_linears,
    stored_parameters,
    with_multiples,
)
from refold.planning.notes import Notes
from refold.planning.plan import Draft, Plan, StackPlan, plan_model, replan
from refold.planning.replacements import describe_replacements
from refold.recipe.load import RecipeLike, load_recipe
from refold.recipe.recipe import RankEnergy, RankShare, Recipe
from refold.sources.pieces import PieceReader
from refold.sources.source_model import SourceModel, read_source_model


class Measured(NamedTuple):
    """A settled plan, with the source and the moments that its fits read.

    Attributes:
        plan: With measured drops and ranks.
        layers: The source, tied layers in their common frame.
        pieces: Reader of the same weights, with the linear maps in place of dropped parts, and without the units that
            narrower parts lose.
        store: Moments, in the same frames and of the kept units; None where errors are not weighted.
    """

    plan: Plan
    layers: SourceLayers
    pieces: PieceReader
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
            f"(in Python: calibration=[FILE]), or set relax.weight, factor.weight and width.weight to none"
        )
    if recipe.replaces and not has_text:
        raise RecipeError(
            "drop: calibration text is required for `replace: linear`, moments and measurements are not enough (got "
            "none); give --calibration FILE (in Python: calibration=[FILE]), or set replace to none"
        )
    if recipe.counts_tokens and not has_text:
        raise RecipeError(
            "vocabulary.keep: calibration text is required for `used` (got none); give --calibration FILE (in Python: "
            "calibration=[FILE]), or name a file of tokens"
        )
    if recipe.needs_influence and plan.influence is None and not has_text:
        raise RecipeError(
            "drop: measurements or calibration text are required for `by: similarity` (got neither); give "
            "--measurements DIR of `refold analyse` or --calibration FILE (in Python: measurements=, calibration=), or "
            "set by to even"
        )


def reads_text(plan: StackPlan) -> bool:
    """Tells whether a plan measures something on calibration text."""
    recipe = plan.recipe
    return recipe.needs_text or recipe.replaces or recipe.counts_tokens or _measures_influence(plan, has_text=True)


def expect_measurements(plan: StackPlan, has_text: bool, progress: Progress) -> None:
    """Sets the steps of the measurements that a plan waits for."""
    num_layers = plan.blueprint.arch.num_layers
    progress.expect("influence", num_layers if _measures_influence(plan, has_text) else 0)
    progress.expect("replacements", num_layers if plan.recipe.replaces else 0)
    passes = 1 if plan.starts.weight == "activations" else 2
    progress.expect("moments", passes * num_layers if plan.recipe.needs_text else 0)
    checked = plan.recipe.needs_text and plan.recipe.shrinkage is None
    progress.expect("shrinkage", len(measured_groups(plan)) if checked else 0)
    width = plan.recipe.width
    measured = measured_parts(plan.blueprint, width) if width is not None and plan.recipe.measures_widths else ()
    progress.expect("widths", len(measured))
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
        progress: Progress of the phases `influence`, `moments`, `shrinkage` and `ranks`.

    Raises:
        DataError: The text is too short or cannot be read.
        RecipeError: The budget is below the smallest ranks.
        SourceError: The moments are another source's.
    """
    recipe, progress = draft.recipe, progress or Progress()
    measures_influence = _measures_influence(draft, text is not None)
    packed = folds = None
    if measures_influence or recipe.replaces or (recipe.needs_text and moments is None):
        assert text is not None
        packed, folds = pack_folds(layers.model, text, recipe)
    if measures_influence:
        assert packed is not None
        influence = measure_influence(layers, packed, progress=progress.of("influence"))
        draft = plan_model(layers.model, recipe, allow_larger=True, influence=influence)
    maps: tuple[MeasuredMap, ...] = ()
    if draft.starts.replacements:
        assert packed is not None
        maps = measure_replacements(layers, packed, map_plan(draft), folder, progress.of("replacements"))
    store = None
    if recipe.needs_text and moments is not None:
        store = MomentStore(moments)
        with_folds = recipe.shrinkage is None
        store.check(layers.model.source.fingerprint(), recipe.weight == "fisher", with_folds=with_folds)
    elif recipe.needs_text:
        assert packed is not None
        store = MomentStore(folder, folds=folds)
        _measure_moments(layers, packed, store, recipe, progress.of("moments"))
    if store is not None:
        store.shrinkage = _shrinkage(draft, layers, store, progress.of("shrinkage"))
    if draft.starts.align != "none":
        frames = align_layers(draft.blueprint, draft.starts.align, layers.pieces, layers.device)
        layers = layers.with_pieces(FramedPieces(layers.pieces, frames))
        store = None if store is None else FramedMoments(store, frames)
    pieces = layers.pieces
    if maps:
        pieces = ReplacedPieces(pieces, maps)
        store = None if store is None else ReplacedMoments(store, maps)
    narrow = _narrow(draft, layers.with_pieces(pieces), store, progress.of("widths"))
    if maps:
        noted = narrow.draft.model_copy(update={"notes": _with_kept(narrow.draft.notes, maps)})
        narrow = narrow._replace(draft=noted)
    plan = narrow.draft.settle()
    if recipe.measures_ranks:
        plan = _measure_ranks(narrow, layers.device, progress.of("ranks"))
    return Measured(plan, layers, narrow.pieces, narrow.store)


def _shrinkage(draft: Draft, layers: SourceLayers, store: MomentStore, progress: DoneReport) -> Shrinkage:
    """Returns the strengths of the recipe, or those that a cross-check chooses."""
    given = draft.recipe.shrinkage
    if given is not None:
        return Shrinkage(given)
    groups = [
        (group, draft.blueprint.pool(group.pool)[group.part].factors.get(group.linear))
        for group in measured_groups(draft)
    ]
    with torch.inference_mode():
        return choose_shrinkage(groups, layers.pieces, store, layers.device, progress)


def map_plan(plan: StackPlan) -> MapPlan:
    """Returns the linear maps of a plan, with all dropped parts."""
    depths = plan.blueprint.depths
    dropped: set[tuple[int, Pool]] = {
        (depth.source, pool) for depth in depths for pool in POOLS if getattr(depth, pool) is None
    }
    return MapPlan(plan.starts.replacements, dropped, is_alone=plan.recipe.fits_in_sequence)


def _with_kept(notes: Notes, maps: Sequence[MeasuredMap]) -> Notes:
    """Returns notes in which each map is described with the energy that it keeps."""
    planned = describe_replacements(tuple(each.replacement for each in maps))
    kept = {text: each.describe() for text, each in zip(planned, maps, strict=True)}
    return tuple(note.model_copy(update={"text": kept.get(note.text, note.text)}) for note in notes)


class _Narrowed(NamedTuple):
    """A draft with settled widths, and the weights and moments of the kept units."""

    draft: Draft
    pieces: PieceReader
    store: MomentStore | None


def _narrow(draft: Draft, layers: SourceLayers, store: MomentStore | None, progress: DoneReport) -> _Narrowed:
    """Chooses the units that leave narrower parts."""
    recipe = draft.recipe
    if recipe.width is None or recipe.weights == "fresh":
        return _Narrowed(draft, layers.pieces, store)
    known: Removals = {}
    with torch.inference_mode():
        finder = RemovalFinder(layers.pieces, store, recipe.weight, layers.device)
        if recipe.measures_widths:
            widths, known = finder.measure(draft.blueprint, recipe.width, progress)
            draft = plan_model(layers.model, recipe, True, draft.influence, widths)
        kept = keep_units(draft.blueprint, finder, known)
    pieces = NarrowedPieces(layers.pieces, kept, store, layers.device)
    return _Narrowed(draft, pieces, None if store is None else NarrowedMoments(store, layers.arch, kept))


def _measure_ranks(given: _Narrowed, device: str, progress: DoneReport) -> Plan:
    draft, pieces, store = given
    is_joint = draft.starts.lora == "joint"
    with torch.inference_mode():
        linears = measure_linears(
            measured_groups(draft), draft.recipe.weight, is_joint, pieces, store, device, progress
        )
    chosen = with_multiples(_choose(draft, linears), draft.recipe)
    return replan(draft, pieces.model, chosen).settle()


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
    with CheckpointReader(model.source.fetch()) as reader, fast_float32(device):
        packed, folds = pack_folds(model, text, loaded)
        layers = SourceLayers(model, PieceReader(model, reader), device)
        _measure_moments(layers, packed, MomentStore(folder, folds=folds), loaded)
    MomentStore(folder).sign(model.source.fingerprint(), loaded.calibration.tokens, text.name)


Tokenizer = PreTrainedTokenizerBase | None
"""A tokenizer cut to some of the source's tokens; None: the source's own."""


def pack_text(model: SourceModel, text: DataSource, recipe: Recipe, tokenizer: Tokenizer = None) -> PackedSequence:
    """Draws the number of tokens of calibration text that a recipe asks for.

    Raises:
        DataError: The text is too short or cannot be read.
        SourceError: The source has no tokenizer.
    """
    return _pack(model, text, recipe, tokenizer).held_out


def pack_folds(
    model: SourceModel, text: DataSource, recipe: Recipe, tokenizer: Tokenizer = None
) -> tuple[PackedSequence, Int[Tensor, " B"] | None]:
    """Draws calibration text as `pack_text`, with the fold of each sequence if the recipe cross-checks shrinkage.

    Raises:
        DataError, SourceError: As `pack_text`; or one sequence alone cannot be cross-checked.
    """
    found = _pack(model, text, recipe, tokenizer)
    return found.held_out, number_folds(found) if recipe.shrinkage is None else None


def _pack(model: SourceModel, text: DataSource, recipe: Recipe, tokenizer: Tokenizer) -> CalibrationText:
    length = min(recipe.calibration.context, model.arch.max_position_embeddings)
    return pack_calibration(
        text,
        tokenizer or load_tokenizer(model.source),
        sequence_length=length,
        num_fit=0,
        num_held_out=max(1, recipe.calibration.tokens // length),
        seed=recipe.seed,
        vocab_size=model.arch.vocab_size,
    )


def _measure_moments(
    layers: SourceLayers,
    packed: PackedSequence,
    store: MomentStore,
    recipe: Recipe,
    progress: DoneReport = lambda done: None,
) -> None:
    gradients = recipe.weight == "fisher"
    measure_moments(layers, packed, store, store.folder, with_gradients=gradients, seed=recipe.seed, progress=progress)


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
    factor = recipe.factor
    if factor is None:
        assert isinstance(rank, RankShare)
        assert rank.parameters is not None
        budget = int(rank.parameters * plan.cost.source.non_embedding_parameters) - paid
        budget += sum(each.whole for each in linears)
    else:
        paid += sum(
            stored_parameters(blueprint, each) for each in stored_linears(blueprint) if each[:3] not in measured
        )
        assert factor.parameters is not None
        budget = linear_budget(source, factor.parameters) - paid
    if budget <= 0:
        where = "relax.rank" if factor is None else "factor"
        raise RecipeError(
            f"{where}.parameters: a share that holds the linears whose ranks are not measured is required (got "
            f"{-budget:,} parameters too few); raise it"
        )
    floor, multiple = (0.0, 1) if factor is None else (factor.floor, factor.multiple)
    choice = Choice(factors=factor is not None, loras=measures_loras, floor=floor, multiple=multiple)
    return allocate(linears, blueprint, choice, budget)
