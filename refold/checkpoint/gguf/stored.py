"""The tensors of a GGUF model, dequantised and in the order of transformers."""

from pathlib import Path
from typing import Any

import torch

from refold.checkpoint.dtypes import torch_dtype
from refold.checkpoint.gguf.block_types import BLOCK_TYPES, PLAIN
from refold.checkpoint.gguf.source import GgufSource, StoredAs
from refold.checkpoint.headers import TensorInfo
from refold.checkpoint.reader import StoredTensors
from refold.errors import SourceError

CHUNK_ELEMENTS = 1 << 22
"""Numbers that are dequantised at once, which bounds the memory beside the result."""
_BLOCKS = {block.name: block for block in BLOCK_TYPES.values()}
_NUMBERS = {block.name: number for number, block in BLOCK_TYPES.items()}


class GgufTensors(StoredTensors):
    """The tensors of one or several GGUF files.

    Args:
        path: The file, or the first of several.

    Raises:
        SourceError: A file is missing or damaged, or holds no model of a supported architecture.
    """

    def __init__(self, path: Path):
        self._source = GgufSource(path)
        headers = self._source.headers()
        assert headers is not None
        self.headers = headers
        self._files: dict[str, torch.Tensor] = {}

    def read(self, name: str, rows: slice) -> torch.Tensor:
        info, stored = self.headers.tensors[name], self._source.stored_as(name)
        order = find_rows(stored, info.shape[0])
        # Without a changed order the rows lie side by side.
        wanted = rows if order is None else order[rows]
        tensor = self._unpack(info, wanted)
        # As llama.cpp's converter added it, in float32.
        return tensor if not stored.offset else tensor.float() - stored.offset

    def close(self) -> None:
        self._files.clear()

    def _unpack(self, info: TensorInfo, rows: slice | torch.Tensor) -> torch.Tensor:
        """Returns rows as they are stored, or dequantised in float32."""
        block = _BLOCKS[info.dtype]
        row_bytes = info.shape[-1] // block.num_elements * block.num_bytes
        if len(info.shape) == 1 and info.dtype in PLAIN:
            return self._bytes(info).view(torch_dtype(info.dtype))[rows]
        packed = self._bytes(info).view(*info.shape[:-1], row_bytes)[rows]
        if info.dtype in PLAIN:
            return packed.view(torch_dtype(info.dtype))
        return dequantise(packed, info.dtype)

    def _bytes(self, info: TensorInfo) -> torch.Tensor:
        if info.file not in self._files:
            path, size = self._source.path.with_name(info.file), self.headers.files[info.file]
            try:
                self._files[info.file] = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0][:120]
                raise SourceError(f"{path}: a readable file is required ({reason}); check it") from None
        return self._files[info.file][info.start : info.end]


def find_rows(stored: StoredAs, num_rows: int) -> torch.Tensor | None:
    """Returns for each row in the order of transformers its place in the file; None for the same order."""
    if stored.order == "same":
        return None
    places = torch.arange(num_rows)
    if stored.order == "pairs":
        # The file has [heads, pairs, halves], transformers [heads, halves, pairs].
        return places.view(-1, stored.head_dim // 2, 2).transpose(1, 2).reshape(-1)
    # The file has [projections, heads, head_dim], transformers [heads, projections, head_dim].
    return places.view(3, -1, stored.head_dim).transpose(0, 1).reshape(-1)


def dequantise(packed: torch.Tensor, type_name: str) -> torch.Tensor:
    """Dequantises rows of blocks in float32, exactly as llama.cpp does.

    Args:
        packed: Bytes of the blocks, one row of the tensor in the last dimension.
        type_name: llama.cpp's name of the type.

    Raises:
        SourceError: The package `gguf`, which knows the layouts of blocks, is not installed.
    """
    quants = _import_quants(type_name)
    block = _BLOCKS[type_name]
    rows = packed.reshape(-1, packed.shape[-1])
    width = packed.shape[-1] // block.num_bytes * block.num_elements
    result = torch.empty(rows.shape[0], width, dtype=torch.float32)
    step = max(1, CHUNK_ELEMENTS // width)
    for start in range(0, len(rows), step):
        chunk = quants.dequantize(rows[start : start + step].numpy(), _NUMBERS[type_name])
        result[start : start + step] = torch.from_numpy(chunk)
    return result.view(*packed.shape[:-1], width)


def _import_quants(type_name: str) -> Any:
    try:
        from gguf import quants
    except ImportError:
        raise SourceError(
            f"{type_name}: the package gguf is required to dequantise (not installed); pip install 'refold[gguf]'"
        ) from None
    return quants
