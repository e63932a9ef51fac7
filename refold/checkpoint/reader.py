"""Reader of a checkpoint folder's tensors, with a record of tensors that were never read."""

from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from refold.blueprint.former import current_names
from refold.blueprint.schema import Blueprint
from refold.checkpoint.folder import settle
from refold.checkpoint.headers import CheckpointHeaders, TensorInfo, read_headers
from refold.errors import SourceError


class CheckpointReader:
    """Reads tensors by name.

    A tensor read in its stored dtype is a view of the mapped file: it takes no anonymous memory, and the kernel loads
    and drops its pages. A tensor read in another dtype is a copy.

    Args:
        path: A folder with safetensors weights. A folder of refold is repaired and checked to be complete first.
        blueprint: Blueprint of a folded model, whose tensors get their names in this version; None: a source.

    Raises:
        SourceError: The folder, a shard or a header is missing or damaged.
        FolderError: The folder was written by refold and is torn.
    """

    def __init__(self, path: str | Path, blueprint: Blueprint | None = None):
        self.path = settle(path)
        headers = read_headers(self.path)
        assert headers is not None
        self._stored = {name: name for name in headers.tensors}
        if blueprint is not None:
            self._stored = current_names(blueprint, headers.tensors)
            tensors = {name: headers.tensors[stored] for name, stored in self._stored.items()}
            headers = replace(headers, tensors=tensors)
        self.headers: CheckpointHeaders = headers
        self._unread = dict.fromkeys(headers.tensors)
        self._files: dict[str, Any] = {}

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
        """Returns a tensor on the CPU; treat it as read-only.

        Args:
            name: Its name.
            dtype: Dtype of the result; None: the stored dtype.

        Raises:
            SourceError: There is no such tensor, or its file is damaged.
        """
        info = self.info(name)
        try:
            tensor = self._open(info.file).get_tensor(self._stored[name])
        except (SafetensorError, OSError, RuntimeError) as error:
            raise self._damaged(info.file, error) from None
        self._unread.pop(name, None)
        return tensor if dtype is None else tensor.to(dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns rows `start..stop` of a tensor's first dimension; the tensor counts as read."""
        info = self.info(name)
        try:
            tensor = self._open(info.file).get_slice(self._stored[name])[start:stop]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise self._damaged(info.file, error) from None
        self._unread.pop(name, None)
        return tensor if dtype is None else tensor.to(dtype)

    def unread(self) -> list[str]:
        """Returns the names never read so far, in file order."""
        return list(self._unread)

    def close(self) -> None:
        """Closes the files; tensors read before stay valid."""
        self._files.clear()

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self.path / file, framework="pt")
        return self._files[file]

    def _damaged(self, file: str, error: Exception) -> SourceError:
        reason = str(error).partition("\n")[0][:120]
        return SourceError(f"{self.path / file}: readable safetensors are required ({reason}); save it again")
