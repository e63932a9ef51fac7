"""Export of a folded model to another format."""

from pathlib import Path

import torch
from pydantic import ValidationError

from refold.blueprint.schema import Blueprint
from refold.checkpoint import provenance
from refold.checkpoint.card import read_licence, write_card
from refold.checkpoint.companions import copy_companions
from refold.checkpoint.dtypes import torch_dtype
from refold.checkpoint.folder import AtomicFolder
from refold.checkpoint.locate import Source, locate
from refold.checkpoint.reader import CheckpointReader
from refold.errors import ExportError, FolderError
from refold.exporting.registry import find_target
from refold.exporting.target import ExportJob
from refold.modeling.configuration import MODEL_TYPE
from refold.modeling.load import choose_dtype


def export(
    model: str | Path | Source,
    destination: str | Path,
    to: str = "dense",
    *,
    overwrite: bool = False,
    dtype: str | torch.dtype | None = None,
    command: str = "",
) -> Path:
    """Writes a folded model in another format, with tokenizer, licence, model card and provenance.

    Args:
        model: Folder or hub id of a folded model.
        destination: The folder to write; it is complete afterwards, or does not exist.
        to: Name of an export target; `dense` is a stock transformers folder.
        overwrite: Replace a folder that refold wrote.
        dtype: Dtype of the exported weights; None: the model's dtype.
        command: Command line, for the provenance.

    Returns:
        The folder written.

    Raises:
        ExportError: There is no such target, the model is not folded, or the target cannot express it.
        SourceError: The model is missing or broken.
        FolderError: The model is torn; or the destination exists, is locked or cannot be written.
        RefoldError: No such dtype.
    """
    target = find_target(to)
    chosen = choose_dtype(dtype)
    located = model if isinstance(model, Source) else locate(model)
    config = located.read_config()
    blueprint = _read_blueprint(located, config)
    folder = located.fetch()
    if Path(destination).resolve() == folder.resolve():
        raise FolderError(f"{destination}: another folder than the model's is required (it would replace the model)")
    with CheckpointReader(folder, blueprint) as reader:
        stored = torch_dtype(reader.info("model.embed_tokens.weight").dtype)
        number = chosen if isinstance(chosen, torch.dtype) else stored
        with AtomicFolder(destination, overwrite, target.count_bytes(blueprint, number.itemsize)) as out:
            with torch.inference_mode():
                notes = target.write(ExportJob(blueprint, config, reader, out, number))
            if not copy_companions(folder, out.path).has_tokenizer:
                notes = (*notes, "the model has no tokenizer: none was copied")
            stages = provenance.read(folder)
            stage = provenance.Stage(
                stage="export",
                source=provenance.describe_source(located),
                recipe={"to": to, "dtype": str(number).removeprefix("torch.")},
                command=command,
            )
            provenance.write(out.path, provenance.append(stages, stage))
            base = _base_model(stages) or located.hub_id or folder.name
            facts = {
                "made from": located.hub_id or folder.name,
                "format": target.summary,
                "dtype": str(number).removeprefix("torch."),
                "weights": f"{sum(file.stat().st_size for file in out.path.glob('*.safetensors')):,} bytes",
            }
            title = f"{base}, folded, as {to}"
            write_card(out.path, base, title, facts, notes, read_licence(folder), target.usage)
    return out.destination


def _read_blueprint(located: Source, config: dict) -> Blueprint:
    if config.get("model_type") != MODEL_TYPE:
        raise ExportError(
            f"{located.where}: a folded model is required (got model_type {config.get('model_type')!r}); it is not one "
            f"of refold's and needs no export: use it as it is, or fold it with `refold convert`"
        )
    try:
        return Blueprint.model_validate(config.get("blueprint"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(key) for key in ("blueprint", *first["loc"]))
        raise ExportError(f"{located.where}/config.json: {where}: {first['msg']}; convert the source again") from error


def _base_model(stages: list[provenance.Stage]) -> str | None:
    """Returns the source that the model was folded from: a hub id, or the name of a folder."""
    source = next((stage.source for stage in stages if stage.stage == "convert"), {})
    path = source.get("path")
    return source.get("id") if path is None else Path(path).name
