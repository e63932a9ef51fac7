"""Export of a model to another format, and the survey of all formats for one model."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from refold.blueprint.cost import count_weight_bytes
from refold.blueprint.quantisation import holds_integers
from refold.blueprint.schema import Blueprint
from refold.checkpoint import provenance
from refold.checkpoint.atomic_file import require_free, write_file
from refold.checkpoint.card import read_licence, write_card
from refold.checkpoint.companions import copy_companions
from refold.checkpoint.folder import AtomicFolder, require_elsewhere
from refold.checkpoint.locate import Source
from refold.errors import ExportError, FolderError
from refold.exporting.opened import OpenedModel, headers_dtype, opened, read_described
from refold.exporting.registry import TARGETS, find_target
from refold.exporting.target import FLOATS, ExportJob, ExportOptions, ExportTarget, FileTarget, Verdict
from refold.modeling.load import choose_dtype


def export(
    model: str | Path | Source,
    destination: str | Path,
    to: str = "dense",
    *,
    overwrite: bool = False,
    dtype: str | torch.dtype | None = None,
    quantise: str | None = None,
    keep: Mapping[str, str] | None = None,
) -> Path:
    """Writes a folded model, or a source, in another format, with tokenizer, licence, model card and provenance.

    Args:
        model: Folder or hub id.
        destination: The folder to write; it is complete afterwards, or does not exist.
        to: Name of an export target; `dense` is a stock transformers folder.
        overwrite: Replace a folder that refold wrote.
        dtype: Dtype of the exported weights; None: the model's dtype.
        quantise: Format of quantised weights, one of the target's, or `float`; None: floats, or the formats of integers
            that the model stores, if the target has them.
        keep: Format by group (`embeddings`, `head`) or name pattern of tensors that are stored in another format.

    Returns:
        The folder written.

    Raises:
        ExportError: There is no such target or format, or the target cannot hold the model.
        SourceError: The model is missing or broken.
        FolderError: The model is torn; or the destination exists, is locked or cannot be written.
        RefoldError: No such dtype.
    """
    target, chosen = find_target(to), choose_dtype(dtype)
    options = ExportOptions(_name(chosen) if isinstance(chosen, torch.dtype) else None, quantise, dict(keep or {}))
    return write_export(model, destination, target, options, overwrite)


def write_export(
    model: str | Path | Source,
    destination: str | Path,
    target: ExportTarget,
    options: ExportOptions,
    overwrite: bool = False,
    command: str = "",
    report: Callable[[str], object] = str,
) -> Path:
    """Writes a model by a target; see `export`. The command line goes into the provenance, `report` takes notes."""
    target.check(options)
    with opened(model) as found:
        require_elsewhere(destination, found.located.fetch())
        options = target.settle(replace(options, dtype=options.dtype or found.dtype), found.blueprint)
        require_held(target, found.blueprint)
        if isinstance(target, FileTarget) and str(destination).endswith(target.suffix):
            return _write_single(target, found, Path(destination), options, (overwrite, command, report))
        with AtomicFolder(destination, overwrite, target.count_bytes(found.blueprint, options)) as out:
            for sentence in _write(target, found, out, options, command):
                report(sentence)
    return out.destination


def require_held(target: ExportTarget, blueprint: Blueprint) -> None:
    """Checks that a target can hold a model.

    Raises:
        ExportError: It cannot.
    """
    verdict = target.judge(blueprint)
    if verdict.status == "impossible":
        change = f"; it would with {', '.join(verdict.changes)}" if verdict.changes else ""
        raise ExportError(
            f"export: {target.name} cannot hold this model: {'; '.join(verdict.reasons)}{change}; "
            f"see `refold export --list`"
        )


def _write_single(
    target: FileTarget,
    model: OpenedModel,
    path: Path,
    options: ExportOptions,
    how: tuple[bool, str, Callable[[str], object]],
) -> Path:
    """Writes one file, which holds the provenance itself; there is no card."""
    overwrite, command, report = how
    require_free(path, f"{target.suffix} file of refold", target.is_own_file, overwrite)
    needed = target.count_bytes(model.blueprint, options)
    free = shutil.disk_usage(next(each for each in path.absolute().parents if each.exists())).free
    if free < needed:
        raise FolderError(f"{path}: {needed} bytes of disk are required (free: {free}); make room or choose another")
    stage = _stage(target, model, options, command)
    stages = provenance.append(provenance.read(model.folder), stage)
    notes: list[str] = []
    with torch.inference_mode():
        write_file(path, lambda unfinished: notes.extend(target.write_file(model, options, unfinished, stages)))
    for sentence in (*notes, *_float_notes(target, model, options)):
        report(sentence)
    return path


def _stage(target: ExportTarget, model: OpenedModel, options: ExportOptions, command: str) -> provenance.Stage:
    numbers = {
        "dtype": options.dtype,
        "quantise": _quantised(target, model, options),
        "keep": dict(options.keep) or None,
    }
    return provenance.Stage(
        stage="export",
        source=provenance.describe_source(model.located),
        recipe={"to": target.name, **{name: value for name, value in numbers.items() if value is not None}},
        command=command,
    )


def _quantised(target: ExportTarget, model: OpenedModel, options: ExportOptions) -> str | None:
    """Returns the value of `quantise`; for integers of a model also `stored`, or `float` where they could be kept."""
    if options.quantise is not None or not (target.has_stored_formats and holds_integers(model.blueprint)):
        return options.quantise
    return "stored" if options.keeps_integers else FLOATS


def _float_notes(target: ExportTarget, model: OpenedModel, options: ExportOptions) -> tuple[str, ...]:
    """Returns how much larger an export without integers is than a model with integers."""
    if options.quantise is not None or options.keeps_integers or not holds_integers(model.blueprint):
        return ()
    own, size = count_weight_bytes(model.blueprint, options.dtype_bytes), target.count_bytes(model.blueprint, options)
    if size <= own:
        return ()
    return (f"the model's integers are written as {options.dtype}: weights take {size / own:.1f} times its bytes",)


def _write(
    target: ExportTarget, model: OpenedModel, out: AtomicFolder, options: ExportOptions, command: str
) -> tuple[str, ...]:
    with torch.inference_mode():
        source = (model.name, model.blueprint, model.config, model.reader, model.folder)
        notes = (*target.write(ExportJob(*source, out, options)), *_float_notes(target, model, options))
    if not copy_companions(model.folder, out.path).has_tokenizer:
        notes = (*notes, "the model has no tokenizer: none was copied")
    stages = provenance.read(model.folder)
    stage = _stage(target, model, options, command)
    provenance.write(out.path, provenance.append(stages, stage))
    name = model.located.name
    base = _base_model(stages) or name
    quantised = _quantised(target, model, options)
    weights = sum(file.stat().st_size for file in out.path.rglob("*") if file.suffix in WEIGHTS)
    facts = {
        "made from": name,
        "format": target.summary,
        "dtype": options.dtype or "",
        **({} if quantised is None else {"quantised": quantised}),
        "weights": f"{weights:,} bytes",
    }
    title = f"{base}, folded, as {target.name}"
    write_card(out.path, base, title, facts, notes, read_licence(model.folder), target.usage)
    return notes


WEIGHTS = (".safetensors", ".gguf", ".onnx", ".data", ".onnx_data")
"""Endings of files with weights."""


@dataclass(frozen=True)
class SurveyedTarget:
    """One export target for one model.

    Attributes:
        target: The target.
        verdict: How it holds the model.
        num_bytes: Bytes of the exported weights in the model's dtype; None if it is impossible.
        share: These bytes divided by the model's own.
    """

    target: ExportTarget
    verdict: Verdict
    num_bytes: int | None
    share: float | None


def survey(model: str | Path | Source) -> list[SurveyedTarget]:
    """Says for every export target how it holds a model; reads no weights.

    Args:
        model: Folder or hub id of a folded model or of a source.

    Raises:
        ExportError: The blueprint is damaged.
        SourceError: The model is missing or of an unknown family.
    """
    located, _, blueprint, source = read_described(model)
    options = ExportOptions(dtype=source.dtype if source is not None else headers_dtype(located, blueprint))
    own = count_weight_bytes(blueprint, options.dtype_bytes)
    found = []
    for target in TARGETS.values():
        verdict = target.judge(blueprint)
        settled = target.settle(options, blueprint)
        size = None if verdict.status == "impossible" else target.count_bytes(blueprint, settled)
        becomes_floats = holds_integers(blueprint) and not settled.keeps_integers
        if size is not None and size > own and verdict.status == "kept" and becomes_floats:
            again = f"; --quantise {target.quantisations[0]} rounds them again" if target.quantisations else ""
            verdict = replace(verdict, status="larger", reasons=(f"integers become floats{again}", *verdict.reasons))
        found.append(SurveyedTarget(target, verdict, size, None if size is None else size / own))
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _base_model(stages: list[provenance.Stage]) -> str | None:
    """Returns the source that the model was folded from: a hub id, or the name of a folder."""
    source = next((stage.source for stage in stages if stage.stage == "convert"), {})
    path = source.get("path")
    return source.get("id") if path is None else Path(path).name
