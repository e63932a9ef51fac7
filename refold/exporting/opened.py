"""Models opened for export: folded ones, and sources as identity blueprints."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from refold.blueprint.integers import Scheme
from refold.blueprint.schema import Blueprint
from refold.blueprint.tensors import target_tensors
from refold.checkpoint.folded_tensors import check_folded_tensors, float_names, read_blueprint
from refold.checkpoint.headers import stored_dtype
from refold.checkpoint.locate import Source, locate
from refold.checkpoint.reader import CheckpointReader
from refold.errors import ExportError, FolderError
from refold.modeling.configuration import MODEL_TYPE
from refold.nn.rounding import Rounded
from refold.planning.build import identity_blueprint
from refold.sources.pieces import PieceReader
from refold.sources.source_model import SourceModel, read_source_model


@runtime_checkable
class TensorSource(Protocol):
    """Reads the tensors of a blueprint by name, such as `model.mixers.0.q_proj.weight`."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a tensor on the CPU, in `dtype` or its stored dtype; treat it as read-only."""
        ...

    def unread(self) -> list[str]:
        """Returns the names of stored tensors that were never read."""
        ...


@runtime_checkable
class IntegerSource(TensorSource, Protocol):
    """Reads tensors of which some are stored as integers."""

    def scheme(self, name: str) -> Scheme | None:
        """Returns the scheme of a weight that is stored as integers; None: it is stored as floats."""
        ...

    def read_rounded(self, name: str) -> Rounded:
        """Returns the integers of a weight."""
        ...


class IdentityTensors:
    """The tensors of a source under the names of its identity blueprint.

    Args:
        model: The source.
        reader: Reader of its files.
    """

    def __init__(self, model: SourceModel, reader: CheckpointReader):
        self._pieces, self._dtype = PieceReader(model, reader), getattr(torch, model.dtype)
        tensors = target_tensors(identity_blueprint(model.arch))
        self._places = {
            each.name: (each.name.removeprefix("model."), None)
            if each.pool is None
            else (f"{each.pool}.{each.local}", each.part)
            for each in tensors
        }
        self._unread = dict.fromkeys(self._places)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a tensor on the CPU, in `dtype` or the source's dtype."""
        canonical, layer = self._places[name]
        self._unread.pop(name, None)
        return self._pieces.read(canonical, layer, dtype or self._dtype)

    def unread(self) -> list[str]:
        """Returns the names never read so far."""
        return list(self._unread)


@dataclass(frozen=True)
class OpenedModel:
    """A model that is open for reading.

    Attributes:
        located: The folder or hub model.
        folder: The folder with its config, tokenizer and licence.
        config: The content of `config.json`.
        blueprint: Its blueprint; that of a source is the identity.
        reader: Reads its tensors.
        dtype: Torch name of the dtype of its numbers.
    """

    located: Source
    folder: Path
    config: dict[str, Any]
    blueprint: Blueprint
    reader: TensorSource
    dtype: str

    @property
    def name(self) -> str:
        """Short name: the hub id, or the name of the folder or file."""
        return self.located.name


def read_described(model: str | Path | Source) -> tuple[Source, dict[str, Any], Blueprint, SourceModel | None]:
    """Reads the blueprint of a folded model, or the identity blueprint of a source; reads no weights.

    Returns:
        The place, the content of `config.json`, the blueprint, and the source; None for a folded model.

    Raises:
        ExportError: The blueprint is damaged.
        SourceError: The model is missing, broken or of an unknown family.
    """
    located = model if isinstance(model, Source) else locate(model)
    config = located.read_config()
    if config.get("model_type") == MODEL_TYPE:
        try:
            return located, config, read_blueprint(located.where, config), None
        except FolderError as error:
            raise ExportError(str(error)) from error
    source = read_source_model(located)
    return located, {**config.get("text_config", {}), **config}, identity_blueprint(source.arch), source


@contextmanager
def opened(model: str | Path | Source) -> Iterator[OpenedModel]:
    """Opens a model, and checks that all its tensors are there.

    Raises:
        ExportError: The blueprint is damaged.
        SourceError: The model is missing, broken or of an unknown family, or has no weights.
        FolderError: The folder is torn, or its tensors are not those of its blueprint.
    """
    located, config, blueprint, source = read_described(model)
    path, folder = located.fetch(), located.fetch_companions()
    if source is not None:
        source.check_tensors()
        with CheckpointReader(path) as reader:
            yield OpenedModel(located, folder, config, blueprint, IdentityTensors(source, reader), source.dtype)
        return
    with CheckpointReader(path, blueprint) as reader:
        check_folded_tensors(located.where, blueprint, reader.headers)
        dtype = stored_dtype(located.where, reader.headers, float_names(blueprint, reader.headers))
        yield OpenedModel(located, folder, config, blueprint, reader, dtype)


def headers_dtype(located: Source, blueprint: Blueprint) -> str:
    """Returns the torch name of the dtype of a folded model's floats, or bfloat16 without weights."""
    headers = located.headers(config_only=True)
    if headers is None:
        return "bfloat16"
    return stored_dtype(located.where, headers, float_names(blueprint, headers))
