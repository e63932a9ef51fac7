"""Tensors of a target that are made before it is written."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from refold.checkpoint.tensor_file import write_tensors


class FittedTensors(Mapping[str, Tensor]):
    """Tensors of a target that are there already, by name: most of them on disk, and read anew each time.

    Args:
        folder: An existing folder, for those that are written.
        given: Those that are there at first.
    """

    def __init__(self, folder: Path, given: Mapping[str, Tensor] | None = None):
        self._folder, self._given = folder, dict(given or {})
        self._paths: dict[str, Path] = {}

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Stores tensors under a key; of the same name the last ones count."""
        path = self._folder / f"{key}.safetensors"
        write_tensors(path, tensors, {})
        self._paths |= dict.fromkeys(tensors, path)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._paths:
            return self._given[name]
        with safe_open(self._paths[name], framework="pt") as file:
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._paths or name in self._given

    def __iter__(self) -> Iterator[str]:
        return iter({**self._given, **self._paths})

    def __len__(self) -> int:
        return len({**self._given, **self._paths})
