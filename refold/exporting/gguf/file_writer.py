"""Writer of GGUF files: header, keys, then one tensor after another."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refold.checkpoint.finite import require_finite
from refold.errors import ExportError, FolderError
from refold.exporting.gguf.contents import FieldValue, GgufContents, GgufTensor, WeightPiece
from refold.exporting.gguf.copied_blocks import encode_blocks, read_tensor_blocks
from refold.exporting.gguf.number_formats import FORMATS, count_tensor_bytes
from refold.exporting.gguf.row_order import place_rows
from refold.exporting.stack_weights import StackWeights
from refold.version import __version__

QUANTISATION_VERSION = 2
"""Version of the block formats, which llama.cpp requires in files that use them."""


MOST_NUMBERS = 1 << 24
"""Numbers that are quantised at once."""
OWN_KEY = "refold.version"
"""Key by which a file of refold is known."""


def is_own_file(path: Path) -> bool:
    """Tells whether a file is a GGUF file that refold wrote."""
    with path.open("rb") as file:
        front = file.read(1 << 16)
    return front.startswith(b"GGUF") and OWN_KEY.encode() in front


def import_gguf() -> Any:
    """Imports the package `gguf`.

    Raises:
        ExportError: It is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise ExportError("export: the package gguf is required (not installed); pip install 'refold[gguf]'") from None
    return gguf


def write_gguf(
    path: Path, contents: GgufContents, formats: dict[str, str], fields: dict[str, FieldValue], weights: StackWeights
) -> int:
    """Writes a file; one tensor is in memory at a time.

    Args:
        path: The file.
        contents: Its keys and tensors.
        formats: Number format by tensor name.
        fields: Further keys, such as the vocabulary's.
        weights: Reads the weights of the model.

    Returns:
        The number of tensors whose integers are those that the model stores.

    Raises:
        ExportError: The package `gguf` is not installed.
        FolderError: A tensor holds a number that is not finite, or is too large for its format.
        SourceError: The model's files are damaged.
    """
    gguf, num_copied = import_gguf(), 0
    writer = gguf.GGUFWriter(path, contents.architecture)
    try:
        for key, value in {OWN_KEY: __version__, **contents.fields, **fields}.items():
            _add_field(writer, key.format(arch=contents.architecture), value)
        for tensor in contents.tensors:
            kind = _kind(gguf, formats[tensor.name])
            size = count_tensor_bytes(tensor, formats[tensor.name])
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype("float32"), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        for tensor in contents.tensors:
            name, written = formats[tensor.name], 0
            blocks = read_tensor_blocks(tensor, name, weights)
            num_copied += blocks is not None
            for data in (
                _encode_tensor(gguf, tensor, name, weights) if blocks is None else (encode_blocks(blocks, name),)
            ):
                file.write(data)
                written += len(data)
            assert written == count_tensor_bytes(tensor, name), tensor.name
            writer.write_padding(file, written)
    finally:
        writer.close()
    return num_copied


def _kind(gguf: Any, name: str) -> Any:
    return gguf.GGMLQuantizationType[name.upper()]


def _encode_tensor(gguf: Any, tensor: GgufTensor, name: str, weights: StackWeights) -> Iterator[memoryview]:
    """Yields the bytes of a tensor in a format, some rows at a time."""
    value = compute_tensor(tensor, weights)
    require_finite(value, tensor.name, "output", FolderError, "the model's numbers were never finite")
    for rows in split_rows(value):
        yield _encode(gguf, rows, name, tensor.name)


def _encode(gguf: Any, rows: Tensor, name: str, where: str) -> memoryview:
    """Returns the bytes of some rows in a format."""
    if FORMATS[name].block == 1:
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[name]
        narrow = rows.to(dtype).contiguous()
        require_finite(narrow, where, "output", FolderError, f"it is too large for {name}; take bf16 or f32")
        return narrow.view(torch.uint8).numpy().reshape(-1).data
    return gguf.quants.quantize(rows.numpy(), _kind(gguf, name)).reshape(-1).data


def _add_field(writer: Any, key: str, value: FieldValue) -> None:
    # A bool is a whole number in Python: it comes first.
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def compute_tensor(tensor: GgufTensor, weights: StackWeights) -> Tensor:
    """Returns a tensor of a file in float32; it is the only one in memory."""
    if tensor.values is not None:
        return torch.tensor(tensor.values, dtype=torch.float32).reshape(tensor.shape)
    if not tensor.pieces:
        return torch.full(tensor.shape, tensor.fill)
    pieces = [_compute_piece(piece, weights) for piece in tensor.pieces]
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return joined.reshape(tensor.shape)


def split_rows(value: Tensor) -> Iterator[Tensor]:
    """Yields a tensor in groups of rows that are small enough to be quantised at once."""
    rows = max(1, MOST_NUMBERS // max(1, value.shape[-1]))
    yield from value.reshape(-1, value.shape[-1]).split(rows)


def _compute_piece(piece: WeightPiece, weights: StackWeights) -> Tensor:
    value = weights.read(piece.canonical, piece.depth, torch.float32)
    if piece.negative_exp:
        value = -value.exp()
    if piece.offset:
        value = value + piece.offset
    if piece.factor != 1.0:
        value = value * piece.factor
    value = place_rows(piece, value)
    missing = 0 if value.ndim == 1 else max(piece.columns - value.shape[1], 0)
    return torch.nn.functional.pad(value, (0, missing)) if missing else value
