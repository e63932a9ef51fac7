"""Reader of a checkpoint's tensors, with a record of tensors that were never read."""

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from refold.blueprint.former import current_names
from refold.blueprint.integers import Scheme
from refold.blueprint.kinds import TargetTensor
from refold.blueprint.schema import Blueprint
from refold.blueprint.tensors import float_tensors
from refold.checkpoint.folder import settle
from refold.checkpoint.gguf.shards import is_gguf
from refold.checkpoint.headers import CheckpointHeaders, TensorInfo, read_headers
from refold.errors import SourceError
from refold.nn.rounding import Rounded, read_stored


class StoredTensors(ABC):
    """The tensors of a checkpoint in one file format.

    Attributes:
        headers: Their headers.
    """

    headers: CheckpointHeaders

    @abstractmethod
    def read(self, name: str, rows: slice) -> torch.Tensor:
        """Returns rows of a tensor: a view of the mapped file, or dequantised numbers in float32.

        Raises:
            SourceError: The file is damaged.
        """

    @abstractmethod
    def close(self) -> None:
        """Closes the files; tensors read before stay valid."""


class CheckpointReader:
    """Reads tensors by name.

    A tensor read in its stored dtype is a view of the mapped file: it takes no anonymous memory, and the kernel loads
    and drops its pages. A tensor read in another dtype, or a quantised one, is a copy.

    Args:
        path: A folder with safetensors weights, or a GGUF file. A folder of refold is repaired and checked to be
            complete first.
        blueprint: Blueprint of a folded model, whose tensors get their names in this version; None: a source.

    Raises:
        SourceError: The folder, a shard or a header is missing or damaged.
        FolderError: The folder was written by refold and is torn.
    """

    def __init__(self, path: str | Path, blueprint: Blueprint | None = None):
        self.path = settle(path)
        self._tensors = open_tensors(self.path)
        headers = self._tensors.headers
        self._stored = {name: name for name in headers.tensors}
        self._quantised: dict[str, tuple[Scheme, TargetTensor]] = {}
        if blueprint is not None:
            schemes = ((tensor, tensor.scheme(blueprint)) for tensor in float_tensors(blueprint))
            self._quantised = {each.name: (scheme, each) for each, scheme in schemes if scheme is not None}
            self._stored = current_names(blueprint, headers.tensors)
            tensors = {name: headers.tensors[stored] for name, stored in self._stored.items()}
            headers = replace(headers, tensors=tensors)
        self.headers: CheckpointHeaders = headers
        self._unread = dict.fromkeys(headers.tensors)

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def names(self) -> list[str]:
        """Returns all tensor names, in file order."""
        return list(self.headers.tensors)

    def info(self, name: str) -> TensorInfo:
        """Returns dtype, shape and byte range of a tensor.

        Raises:
            SourceError: There is no such tensor.
        """
        return self.headers.info(name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns a tensor on the CPU; treat it as read-only. A quantised weight is dequantised.

        Args:
            name: Its name.
            dtype: Dtype of the result; None: the stored dtype, float32 for a quantised tensor.

        Raises:
            SourceError: There is no such tensor, or its file is damaged.
        """
        if name in self._quantised:
            weight = self.read_rounded(name).dequantise()
            return weight if dtype is None else weight.to(dtype)
        return self._read(name, slice(None), dtype)

    def scheme(self, name: str) -> Scheme | None:
        """Returns the scheme of a quantised weight; None: the weight is stored as floats."""
        found = self._quantised.get(name)
        return None if found is None else found[0]

    def read_rounded(self, name: str) -> Rounded:
        """Returns the integers of a quantised weight.

        Raises:
            SourceError: There is no such tensor, or its file is damaged.
        """
        scheme, tensor = self._quantised[name]
        pieces = {each.piece.suffix: self.read(each.name) for each in tensor.stored_as(scheme) if each.piece}
        return read_stored(pieces, scheme, (tensor.shape[0], tensor.shape[1]))

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns rows `start..stop` of a tensor's first dimension; the tensor counts as read."""
        return self._read(name, slice(start, stop), dtype)

    def unread(self) -> list[str]:
        """Returns the names never read so far, in file order."""
        return list(self._unread)

    def close(self) -> None:
        """Closes the files; tensors read before stay valid."""
        self._tensors.close()

    def _read(self, name: str, rows: slice, dtype: torch.dtype | None) -> torch.Tensor:
        self.info(name)
        tensor = self._tensors.read(self._stored[name], rows)
        self._unread.pop(name, None)
        return tensor if dtype is None else tensor.to(dtype)


def open_tensors(path: Path) -> StoredTensors:
    """Opens the tensors of a folder or GGUF file: the one place that chooses the reader of a format.

    Raises:
        SourceError: There are none, or a file is missing or damaged.
    """
    if not is_gguf(path):
        return SafetensorsFolder(path)
    # Imported only here, so that reading safetensors needs no reader of other formats.
    from refold.checkpoint.gguf.stored import GgufTensors

    return GgufTensors(path)


class SafetensorsFolder(StoredTensors):
    """The tensors of a folder with safetensors weights."""

    def __init__(self, path: Path):
        headers = read_headers(path)
        assert headers is not None
        self.headers = headers
        self._path = path
        self._files: dict[str, Any] = {}

    def read(self, name: str, rows: slice) -> torch.Tensor:
        file = self.headers.tensors[name].file
        try:
            opened = self._open(file)
            return opened.get_tensor(name) if rows == slice(None) else opened.get_slice(name)[rows]
        except (SafetensorError, OSError, RuntimeError) as error:
            reason = str(error).partition("\n")[0][:120]
            raise SourceError(
                f"{self._path / file}: readable safetensors are required ({reason}); save it again"
            ) from None

    def close(self) -> None:
        self._files.clear()

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self._path / file, framework="pt")
        return self._files[file]
