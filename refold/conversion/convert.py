"""A plan carried out: one pass over the source's tensors, streamed into a new model folder."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from refold.blueprint.tensors import target_tensors
from refold.calibration.layers import SourceLayers
from refold.checkpoint import provenance
from refold.checkpoint.card import read_licence, write_card
from refold.checkpoint.companions import check_companions, copy_companions
from refold.checkpoint.folder import AtomicFolder
from refold.checkpoint.locate import PLAN_NAME, Source, locate
from refold.checkpoint.reader import CheckpointReader
from refold.checkpoint.writer import ShardedWriter, count_bytes
from refold.conversion.map_fitter import MapFitter
from refold.conversion.measured import (
    measure_plan,
    measuring_steps,
    pack_text,
    reads_text,
    reads_weights,
    require_calibration,
)
from refold.conversion.sequential import FittedTensors, SequentialFitter
from refold.conversion.target_tensors import TargetBuilder
from refold.data.corpus import Data, open_text
from refold.data.mixture import describe_one_kind
from refold.data.readers import DataSource
from refold.errors import RecipeError, SourceError
from refold.modeling.configuration import RefoldConfig
from refold.modeling.load import choose_device
from refold.planning.approximation import require_text, stored_maps
from refold.planning.notes import Note
from refold.planning.plan import Draft, Plan, StackPlan, plan_model, read_influence
from refold.recipe.load import RecipeLike, load_recipe
from refold.sources.measurements import stored_moments
from refold.sources.pieces import PieceReader
from refold.sources.source_model import read_source_model

SCRATCH_NAME = "measured"
"""Folder for what is measured, inside the one that is being made, so that a kill leaves nothing behind."""
CALIBRATION_BYTES = 2**26
"""Bytes of a generator or stream that are read as calibration text."""
PASSED_ON = ("bos_token_id", "eos_token_id", "pad_token_id")
Progress = Callable[[int, int], None]
"""Called with steps done and steps in all: tensors written, and layers whose approximation is measured."""


def convert(
    source: str | Path | Source,
    destination: str | Path,
    recipe: RecipeLike = None,
    overrides: Sequence[str] = (),
    *,
    calibration: Data | None = None,
    measurements: str | Path | None = None,
    overwrite: bool = False,
    allow_larger: bool = False,
    device: str = "cpu",
    command: str = "",
    progress: Progress | None = None,
) -> Plan:
    """Folds a source into a new model folder.

    Args:
        source: Folder or hub id.
        destination: The folder to write: there whole afterwards, or not at all.
        recipe: Built-in name, YAML file, mapping or Recipe; None for the identity.
        overrides: `key.path=value` strings.
        calibration: Text (see `refold.data.corpus`), best of several kinds with weights: `["books.parquet=0.5",
            "docs.parquet=0.5"]`. Errors of fitted linears are weighted by it, maps with `fit: calibration` are fitted
            to it, every approximation of attention is measured on it, and without `measurements` layers are dropped
            by their similarity on it. None: approximations are measured on random inputs.
        measurements: What `analyse` wrote of the source: the folder, or its `measurements.json`. Moments stored there
            weigh errors by activations where there is no calibration text.
        overwrite: Replace a folder refold wrote.
        allow_larger: Accept a target that is smaller than its source in nothing.
        device: Where residuals are decomposed and feature maps fitted.
        command: Command line, for the provenance.
        progress: Told how far the conversion is.

    Returns:
        The plan with the kept energy of every residual and the error of every approximation.

    Raises:
        RecipeError: The recipe is wrong, does not fit the source, or requires calibration text, or has no use for it.
        DataError: The calibration text is missing, broken or too short.
        SourceError: The source is missing, broken or unknown.
        FolderError: The destination is taken, locked or cannot be written, or the measurements are missing or damaged.
    """
    located = source if isinstance(source, Source) else locate(source)
    loaded = load_recipe(recipe, overrides)
    model = read_source_model(located)
    plan = plan_model(model, loaded, allow_larger, read_influence(model, measurements))
    if calibration is not None and not (stored_maps(plan.blueprint, plan.starts) or reads_text(plan)):
        raise RecipeError(
            "calibration: this recipe does not use calibration text; remove --calibration, or set relax.weight, "
            "factor.weight or drop.block.by, or use a mixer of type linear_attention"
        )
    text = None if calibration is None else open_text(calibration, limit=CALIBRATION_BYTES)
    moments = stored_moments(measurements) if text is None and plan.recipe.weight == "activations" else None
    return carry_out(plan, located, destination, overwrite, device, command, progress, text, moments)


def carry_out(
    draft: Draft,
    source: Source,
    destination: str | Path,
    overwrite: bool = False,
    device: str = "cpu",
    command: str = "",
    progress: Progress | None = None,
    calibration: DataSource | None = None,
    moments: Path | None = None,
) -> Plan:
    """Carries a draft out on the source it was made for; arguments as for `convert`.

    With `moments`, a folder that `keep_moments` filled, errors are weighed by those instead of by the text.

    Raises:
        SourceError: The source is not the one the plan was made for, has no weights and not all start fresh, or holds a
            number that is not finite.
        RefoldError: No such device.
        RecipeError: A feature map is to be fitted to text and there is none.
        DataError: The calibration text is too short, or cannot be read.
    """
    device = str(choose_device(device))
    maps = stored_maps(draft.blueprint, draft.starts)
    require_text(maps, calibration is not None)
    require_calibration(draft, calibration is not None, moments is not None)
    used_text = calibration is not None and bool(maps or reads_text(draft))
    has_weights = source.headers(config_only=True) is not None
    if not has_weights and reads_weights(draft, calibration is not None):
        raise SourceError(f"{source.where}: safetensors weights are required (only config.json is there)")
    if not draft.source.is_of(source):
        raise SourceError(
            f"{source.where}: the source of the plan is required (config.json or weights differ); plan again"
        )
    dtype = getattr(torch, draft.source.dtype)
    specs = _specs(draft, dtype)
    folder = source.fetch()
    check_companions(folder)
    with (
        AtomicFolder(destination, overwrite, needed_bytes=count_bytes(specs)) as out,
        CheckpointReader(folder) if has_weights else nullcontext() as reader,
    ):
        model = read_source_model(locate(folder))
        pieces = PieceReader(model, reader)
        report = progress or (lambda done, total: None)
        measuring, scratch = measuring_steps(draft, calibration is not None), out.path / SCRATCH_NAME
        scratch.mkdir()
        num_steps = measuring + len(specs)
        plan, pieces, store = measure_plan(
            draft, model, pieces, calibration, scratch, device, lambda done: report(done, num_steps), moments
        )
        specs = _specs(plan, dtype)
        fitter = MapFitter(plan, model, pieces, device)
        fitting = plan.blueprint.num_depths if plan.recipe.fits_in_sequence else 0
        before = measuring + fitter.num_layers + fitting
        num_steps = before + len(specs)
        fitter.run(calibration, lambda done: report(measuring + done, num_steps))
        fitted = FittedTensors(scratch, fitter.tensors)
        builder = TargetBuilder(plan, pieces, dtype, device, fitted, store)
        if fitting:
            assert calibration is not None
            packed = pack_text(model, calibration, plan.recipe)
            in_sequence = SequentialFitter(plan, SourceLayers(model, pieces, device), builder, fitted, device)
            in_sequence.run(packed, lambda done: report(before - fitting + done, num_steps))
        with ShardedWriter(out.path, specs) as writer, torch.inference_mode():
            for done, (name, value) in enumerate(builder.build(), start=before + 1):
                writer.write(name, value)
                report(done, num_steps)
        out.hashes.update(writer.hashes)
        shutil.rmtree(scratch)
        companions = copy_companions(folder, out.path)
        said = list(plan.notes)
        if used_text:
            assert calibration is not None
            said.append(Note(text=f"calibration text: {calibration.name}"))
            if (price := describe_one_kind(calibration, "calibration")) is not None:
                said.append(Note(text=price))
        if not companions.has_tokenizer:
            said.append(Note(text="the source has no tokenizer: none was copied"))
        found = {"kept_energy": builder.kept_energy, "approximation": fitter.approximation, "notes": tuple(said)}
        made = plan.model_copy(update=found)
        _write_config(plan, source, out.path)
        (out.path / PLAN_NAME).write_text(made.model_dump_json(indent=2) + "\n")
        stage = provenance.Stage(
            stage="convert",
            source=provenance.describe_source(source),
            recipe=plan.recipe.model_dump(mode="json", exclude_none=True),
            seed=plan.starts.seed,
            command=command,
        )
        provenance.write(out.path, [stage])
        _write_card(made, source, folder, out.path)
    return made


def _specs(plan: StackPlan, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {tensor.name: (tensor.shape, dtype) for tensor in target_tensors(plan.blueprint)}


def _write_config(plan: Plan, source: Source, folder: Path) -> None:
    raw = source.read_config()
    # A model of several parts may name its tokens in the part for text.
    raw = {**(raw.get("text_config") or {}), **raw}
    config = RefoldConfig(
        blueprint=plan.blueprint.model_dump(mode="json"),
        architectures=["RefoldForCausalLM"],
        dtype=plan.source.dtype,
        **{name: raw[name] for name in PASSED_ON if raw.get(name) is not None},
    )
    config.save_pretrained(folder)


def _write_card(plan: Plan, source: Source, folder: Path, target: Path) -> None:
    base = source.hub_id or folder.name
    facts = {row.quantity.replace("_", " "): f"{row.target:,} (source {row.source:,})" for row in plan.summary()}
    kept = plan.kept_energy.values()
    if kept:
        facts["kept residual energy"] = f"{min(kept):.1%} to {max(kept):.1%} over {len(kept)} matrices"
    write_card(target, base, f"{base}, folded", facts, [note.text for note in plan.notes], read_licence(folder))
