"""Conversion of a source into a new model folder: measure, fit, write, record; tensors are streamed."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from refold.blueprint.cost import cost, count_weight_bytes
from refold.blueprint.quantisation import with_schemes
from refold.blueprint.tensors import target_tensors
from refold.calibration.layers import SourceLayers
from refold.checkpoint import provenance
from refold.checkpoint.card import read_licence, write_card
from refold.checkpoint.companions import check_companions
from refold.checkpoint.folder import AtomicFolder, require_elsewhere
from refold.checkpoint.locate import PLAN_NAME, Source, locate
from refold.checkpoint.reader import CheckpointReader
from refold.checkpoint.writer import ShardedWriter, count_bytes
from refold.conversion.integer_weights import write_integers
from refold.conversion.map_fitter import MapFitter, mapped_layers
from refold.conversion.measured import (
    Measured,
    expect_measurements,
    measure_plan,
    pack_folds,
    pack_text,
    reads_text,
    reads_weights,
    require_calibration,
)
from refold.conversion.progress import Progress, StepReport
from refold.conversion.rounding_pass import RoundingText
from refold.conversion.sequential import FittedTensors, SequentialFitter
from refold.conversion.target_tensors import TargetBuilder
from refold.conversion.vocabulary import find_kept, with_kept, write_companions
from refold.data.corpus import Data, name_parts, open_text
from refold.data.mixture import describe_one_kind
from refold.data.readers import DataSource
from refold.errors import RecipeError, SourceError, given_or_default
from refold.modeling.configuration import RefoldConfig
from refold.modeling.load import choose_device, load_tokenizer
from refold.nn.processor import fast_float32
from refold.planning.approximation import Approximation, require_text, stored_maps
from refold.planning.notes import Note
from refold.planning.plan import CostPair, Draft, Plan, StackPlan, plan_model, read_influence
from refold.planning.schemes import choose_schemes
from refold.recipe.load import RecipeLike, load_recipe
from refold.sources.measurements import stored_moments
from refold.sources.pieces import PieceReader
from refold.sources.source_model import read_source_model
from refold.vocabulary.kept_tokens import KeptTokens
from refold.vocabulary.rows import KeptPieces
from refold.vocabulary.tokenizer_folder import map_ids

SCRATCH_NAME = "measured"
"""Folder for moments and fitted tensors inside the unfinished model folder, so that a kill leaves nothing behind."""
CALIBRATION_BYTES = 2**26
"""Bytes of a generator or stream that are read as calibration text."""
PASSED_ON = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class ConvertOptions:
    """Settings of one conversion that are no part of a recipe.

    Attributes:
        overwrite: Replace a folder that refold wrote.
        allow_larger: Accept a folded model that is smaller than its source in nothing; checked when the plan is made.
        device: Device that decomposes residuals and fits feature maps.
        command: Command line, for the provenance.
        progress: Called with the steps done and the steps in all.
    """

    overwrite: bool = False
    allow_larger: bool = False
    device: str = "cpu"
    command: str = ""
    progress: StepReport | None = None


def convert(
    source: str | Path | Source,
    destination: str | Path,
    recipe: RecipeLike = None,
    overrides: Sequence[str] = (),
    options: ConvertOptions | None = None,
    *,
    calibration: Data | None = None,
    measurements: str | Path | None = None,
) -> Plan:
    """Folds a source into a new model folder.

    Args:
        source: Folder or hub id.
        destination: The folder to write; it is complete afterwards, or does not exist.
        recipe: Built-in name, YAML file, mapping or Recipe; None for the identity.
        overrides: `key.path=value` strings.
        options: Settings beside the recipe, such as `overwrite`, `allow_larger` and the device.
        calibration: Text (see `refold.data.corpus`), best of several kinds with weights: `["books.parquet=0.5",
            "docs.parquet=0.5"]`. Errors of fitted linears are weighted by its moments, maps with `fit: calibration`
            are fitted to it, and every approximation of attention is measured on it. Without `measurements` it also
            ranks layers by similarity. None: approximations are measured on random inputs.
        measurements: The folder that `analyse` wrote for the source, or its `measurements.json`. Without calibration
            text, errors are weighted by the moments stored there.

    Returns:
        The plan with the kept energy of every residual and the error of every approximation.

    Raises:
        RecipeError: The recipe is wrong, does not fit the source, lacks calibration text, or does not use it.
        DataError: The calibration text is missing, broken or too short.
        SourceError: The source is missing, broken or unknown.
        FolderError: The destination is taken, locked or cannot be written, or the measurements are missing or damaged.
    """
    located = source if isinstance(source, Source) else locate(source)
    loaded, options = load_recipe(recipe, overrides), given_or_default(options, ConvertOptions, "options")
    model = read_source_model(located)
    plan = plan_model(model, loaded, options.allow_larger, read_influence(model, measurements))
    if calibration is not None and not _uses_text(plan):
        raise RecipeError(
            "calibration: this recipe does not use calibration text; remove --calibration, or set relax.weight, "
            "factor.weight, width.weight, drop.block.by or drop.block.replace, or use quantise, vocabulary or a mixer "
            "of type linear_attention"
        )
    text = None if calibration is None else open_text(calibration, limit=CALIBRATION_BYTES)
    moments = stored_moments(measurements) if text is None and plan.recipe.weight == "activations" else None
    return carry_out(plan, located, destination, options, calibration=text, moments=moments)


def carry_out(
    draft: Draft,
    source: Source,
    destination: str | Path,
    options: ConvertOptions | None = None,
    *,
    calibration: DataSource | None = None,
    moments: Path | None = None,
) -> Plan:
    """Carries out a draft on the source that it was made for.

    Args:
        draft: The plan; its drops and ranks may still have to be measured.
        source: The source of the draft.
        destination: As for `convert`.
        options: As for `convert`; `allow_larger` changes nothing here.
        calibration: As for `convert`, opened.
        moments: A folder that `keep_moments` filled; errors are weighted by its moments instead of by the text's.

    Raises:
        SourceError: The source is not the draft's, has no weights although the plan reads some, or holds a number that
            is not finite.
        RefoldError: No such device.
        RecipeError: A feature map is to be fitted to text and there is none.
        DataError: The calibration text is too short, or cannot be read.
    """
    options = given_or_default(options, ConvertOptions, "options")
    device = str(choose_device(options.device))
    wanted, draft = draft, draft.with_floats()
    _require_inputs(draft, source, calibration is not None, moments is not None)
    path, progress = source.fetch(), Progress(options.progress)
    require_elsewhere(destination, path)
    check_companions(source.fetch_companions())
    expect_measurements(draft, calibration is not None, progress)
    _expect_fits(draft, progress)
    needed = count_bytes(_specs(draft))
    if wanted.recipe.quantises:
        needed += count_weight_bytes(wanted.blueprint, _dtype(wanted).itemsize)
        steps = len(_specs(draft)) + 2 * draft.blueprint.num_depths * wanted.recipe.rounds_by_text
        progress.expect("round", steps)
    with (
        AtomicFolder(destination, options.overwrite, needed) as out,
        CheckpointReader(path) if _has_weights(source) else nullcontext() as reader,
        fast_float32(device),
    ):
        scratch = out.path / SCRATCH_NAME
        scratch.mkdir()
        model = read_source_model(locate(path))
        layers = SourceLayers(model, PieceReader(model, reader), device)
        measured = measure_plan(draft, layers, calibration, scratch, moments, progress)
        kept = find_kept(measured.plan, model, calibration)
        if kept is not None:
            measured = measured._replace(plan=with_kept(measured.plan, kept, _dtype(measured.plan).itemsize))
            progress.of("vocabulary")(1)
        _expect_fits(measured.plan, progress)
        builder, approximation = _fit(measured, kept, calibration, scratch, progress)
        if wanted.recipe.quantises:
            text = _pack_for_rounding(measured, wanted, kept, calibration, scratch)
            plan = _write_rounded(measured, wanted, builder, out, text, progress)
        else:
            plan = measured.plan
            _write(plan, builder, out, progress)
        shutil.rmtree(scratch)
        found = {
            "kept_energy": builder.kept_energy,
            "factor_energy": builder.factor_energy,
            "approximation": approximation,
            "notes": (*plan.notes, *_calibration_notes(wanted, calibration)),
        }
        is_used = calibration is not None and _uses_text(wanted)
        texts = name_parts(calibration) if calibration is not None and is_used else {}
        return _record(plan.model_copy(update=found), source, kept, out.path, options.command, texts)


def _has_weights(source: Source) -> bool:
    return source.headers(config_only=True) is not None


def _require_inputs(draft: Draft, source: Source, has_text: bool, has_moments: bool) -> None:
    """Checks that a draft can be carried out on a source, with text or without."""
    require_text(stored_maps(draft.blueprint, draft.starts), has_text)
    require_calibration(draft, has_text, has_moments)
    if not _has_weights(source) and reads_weights(draft, has_text):
        raise SourceError(f"{source.where}: safetensors weights are required (only config.json is there)")
    if not draft.source.is_of(source):
        raise SourceError(
            f"{source.where}: the source of the plan is required (config.json or weights differ); plan again"
        )


def _expect_fits(plan: StackPlan, progress: Progress) -> None:
    """Sets the steps of fitting and writing, which measured drops change."""
    progress.expect("maps", len(mapped_layers(stored_maps(plan.blueprint, plan.starts))))
    progress.expect("sequence", plan.blueprint.num_depths if plan.recipe.fits_in_sequence else 0)
    progress.expect("write", len(_specs(plan)))


def _fit(
    measured: Measured, kept: KeptTokens | None, text: DataSource | None, scratch: Path, progress: Progress
) -> tuple[TargetBuilder, dict[str, Approximation]]:
    """Fits feature maps, then linears in sequence; returns the builder of the target and the error of each map."""
    plan, layers, pieces, store = measured
    maps = MapFitter(plan, layers.model, layers.pieces, layers.device)
    maps.run(text, progress.of("maps"))
    fitted = FittedTensors(scratch, maps.tensors)
    pieces = pieces if kept is None else KeptPieces(pieces, kept)
    builder = TargetBuilder(plan, pieces, _dtype(plan), layers.device, fitted, store)
    if plan.recipe.fits_in_sequence:
        assert text is not None
        packed = pack_text(layers.model, text, plan.recipe)
        SequentialFitter(plan, layers, builder, fitted, layers.device).run(packed, progress.of("sequence"))
    return builder, maps.approximation


def _pack_for_rounding(
    measured: Measured, wanted: Draft, kept: KeptTokens | None, calibration: DataSource | None, scratch: Path
) -> RoundingText | None:
    """Packs text for rounding with feedback, in the tokens of the target; None if weights are rounded without text."""
    if calibration is None or not wanted.recipe.rounds_by_text:
        return None
    model, tokenizer = measured.layers.model, None
    if kept is not None:
        folder = scratch / "tokenizer"
        folder.mkdir()
        write_companions(model.source, folder, kept, make_config(measured.plan, model.source, kept))
        tokenizer = load_tokenizer(folder)
    packed, folds = pack_folds(model, calibration, wanted.recipe, tokenizer)
    return RoundingText(packed, wanted.recipe.shrinkage, folds)


def _write_rounded(
    measured: Measured,
    wanted: Draft,
    builder: TargetBuilder,
    out: AtomicFolder,
    text: RoundingText | None,
    progress: Progress,
) -> Plan:
    """Writes the tensors as floats beside the model, then the model with rounded weights; returns its plan."""
    floats = AtomicFolder(out.path / SCRATCH_NAME / "floats")
    section, blueprint = wanted.recipe.quantise, measured.plan.blueprint
    assert section is not None
    schemes = choose_schemes(blueprint, section)
    with floats:
        _write(measured.plan, builder, floats, progress)
    with CheckpointReader(floats.destination, blueprint) as reader:
        tell = progress.of("round")
        write_integers(reader, blueprint, schemes, out, text, measured.layers.device, lambda done, _: tell(done))
    made = with_schemes(blueprint, schemes)
    costs = CostPair(source=wanted.cost.source, target=cost(made, _dtype(wanted).itemsize))
    return measured.plan.model_copy(update={"recipe": wanted.recipe, "blueprint": made, "cost": costs})


def _write(plan: Plan, builder: TargetBuilder, out: AtomicFolder, progress: Progress) -> None:
    """Writes the tensors of the target one by one."""
    tell = progress.of("write")
    with ShardedWriter(out.path, _specs(plan)) as writer, torch.inference_mode():
        for done, (name, value) in enumerate(builder.build(), start=1):
            writer.write(name, value)
            tell(done)
    out.hashes.update(writer.hashes)


def _record(
    plan: Plan, source: Source, kept: KeptTokens | None, target: Path, command: str, texts: Mapping[str, float | None]
) -> Plan:
    """Writes all files beside the weights, and returns the plan with a note if the source has no tokenizer.

    Args:
        plan: The settled plan, with measured errors.
        source: The source as the caller named it.
        kept: The kept tokens; None: all.
        target: The folder to write.
        command: Command line, for the provenance.
        texts: Share of each kind of calibration text, by name.
    """
    if not write_companions(source, target, kept, make_config(plan, source, kept)).has_tokenizer:
        notes = (*plan.notes, Note(text="the source has no tokenizer: none was copied"))
        plan = plan.model_copy(update={"notes": notes})
    (target / PLAN_NAME).write_text(plan.model_dump_json(indent=2) + "\n")
    stage = provenance.Stage(
        stage="convert",
        source=provenance.describe_source(source),
        recipe=plan.recipe.model_dump(mode="json", exclude_none=True),
        seed=plan.starts.seed,
        text=dict(texts),
        command=command,
    )
    provenance.write(target, [stage])
    _write_card(plan, source, target)
    return plan


def _uses_text(plan: StackPlan) -> bool:
    return bool(stored_maps(plan.blueprint, plan.starts)) or reads_text(plan) or plan.recipe.rounds_by_text


def _calibration_notes(draft: Draft, text: DataSource | None) -> list[Note]:
    """Returns notes on the calibration text: its name, and the risk of text of one kind."""
    if text is None or not _uses_text(draft):
        return []
    price = describe_one_kind(text, "calibration")
    return [Note(text=f"calibration text: {text.name}"), *([] if price is None else [Note(text=price)])]


def _dtype(plan: StackPlan) -> torch.dtype:
    return getattr(torch, plan.dtype)


def _specs(plan: StackPlan) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {tensor.name: (tensor.shape, _dtype(plan)) for tensor in target_tensors(plan.blueprint)}


def make_config(plan: StackPlan, source: Source, kept: KeptTokens | None = None) -> RefoldConfig:
    """Returns the config of the folded model, with the special tokens of the source's config.

    Args:
        plan: The plan.
        source: The source.
        kept: The kept tokens, whose new ids the config then has; None: all.
    """
    raw = source.read_config()
    # A model for several kinds of input may name its special tokens in the config of its text part.
    raw = {**(raw.get("text_config") or {}), **raw}
    raw = raw if kept is None else map_ids(raw, kept.numbers)
    return RefoldConfig(
        blueprint=plan.blueprint.model_dump(mode="json"),
        architectures=["RefoldForCausalLM"],
        dtype=plan.dtype,
        **{name: raw[name] for name in PASSED_ON if raw.get(name) is not None},
    )


def _write_card(plan: Plan, source: Source, target: Path) -> None:
    base = source.name
    facts = {row.quantity.replace("_", " "): f"{row.target:,} (source {row.source:,})" for row in plan.summary()}
    kept = plan.kept_energy.values()
    if kept:
        facts["kept residual energy"] = f"{min(kept):.1%} to {max(kept):.1%} over {len(kept)} matrices"
    licence = read_licence(source.fetch_companions())
    write_card(target, base, f"{base}, folded", facts, [note.text for note in plan.notes], licence)
