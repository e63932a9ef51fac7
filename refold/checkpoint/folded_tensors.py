"""The tensors that a folded model must have by its blueprint, compared with its folder; torch-free."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from refold.blueprint.former import current_names
from refold.blueprint.schema import Blueprint
from refold.blueprint.tensors import target_tensors
from refold.checkpoint.headers import CheckpointHeaders
from refold.errors import FolderError
from refold.suggest import shorten

MAX_NAMED = 5
PIECE_DTYPES = {"int32": "I32", "int64": "I64", "bfloat16": "BF16"}
"""Safetensors names of the dtypes of tensors that hold quantised weights."""


def read_blueprint(where: str, config: Mapping[str, Any]) -> Blueprint:
    """Returns the blueprint in a folded model's raw `config.json`.

    Raises:
        FolderError: The config has no blueprint, or a damaged one.
    """
    try:
        return Blueprint.model_validate(config.get("blueprint"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in ("blueprint", *first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise FolderError(
            f"{where}/config.json: {key}: {reason} (got {shorten(first['input'])}); convert the source again"
        ) from None


def float_names(blueprint: Blueprint, headers: CheckpointHeaders) -> frozenset[str]:
    """Returns the names, as they are stored, of all tensors of floats; those that hold integers are left out."""
    names = current_names(blueprint, headers.tensors)
    tensors = (tensor for tensor in target_tensors(blueprint) if tensor.piece is None)
    return frozenset(names[tensor.name] for tensor in tensors if tensor.name in names)


def check_folded_tensors(where: str, blueprint: Blueprint, headers: CheckpointHeaders) -> None:
    """Checks that a folded model's folder holds every tensor of its blueprint, in its shape.

    Raises:
        FolderError: Tensors are missing or have another shape.
    """
    names, faults = current_names(blueprint, headers.tensors), list[str]()
    for tensor in target_tensors(blueprint):
        stored = headers.tensors.get(names.get(tensor.name, ""))
        if stored is None:
            faults.append(f"{tensor.name} is missing")
        elif tensor.piece is not None and stored.dtype != PIECE_DTYPES[tensor.piece.dtype]:
            faults.append(f"{tensor.name} has dtype {stored.dtype}, not {PIECE_DTYPES[tensor.piece.dtype]}")
        elif tuple(stored.shape) != tuple(tensor.shape):
            faults.append(f"{tensor.name} has shape {list(stored.shape)}, not {shorten(list(tensor.shape))}")
        # A damaged blueprint may have millions of depths; the first few names are enough.
        if len(faults) > MAX_NAMED:
            break
    if faults:
        shown = ", ".join(faults[:MAX_NAMED]) + (", ..." if len(faults) > MAX_NAMED else "")
        raise FolderError(f"{where}: weights must be those of its blueprint ({shown}); convert the source again")
