"""One safetensors file: byte ranges of its tensors, and writing without a second copy in memory."""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from refold.checkpoint.dtypes import dtype_name

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by name."""


def lay_out(specs: Specs, header: Mapping[str, object]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Returns the header bytes of a file with these tensors, and the byte range of each tensor in the file.

    Args:
        specs: Shape and dtype of the tensors.
        header: Other entries of the header, such as `__metadata__`.
    """
    entries, offsets, position = dict(header), {}, 0
    # Wider dtypes first, as safetensors does: each tensor then starts at a multiple of its item size.
    for name, (shape, dtype) in sorted(specs.items(), key=lambda item: -item[1][1].itemsize):
        end = position + math.prod(shape) * dtype.itemsize
        offsets[name] = (position, end)
        entries[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    head = struct.pack("<Q", len(raw)) + raw
    return head, {name: (len(head) + start, len(head) + end) for name, (start, end) in offsets.items()}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file; `safetensors.torch.save_file` would hold a second copy of all tensors in memory.

    Args:
        path: The file; an existing file is replaced.
        tensors: Tensors by name.
        metadata: Texts for the header.
    """
    specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    head, places = lay_out(specs, {"__metadata__": dict(metadata)})
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_all(fd, memoryview(head), 0)
        for name, tensor in tensors.items():
            write_all(fd, tensor_bytes(tensor), places[name][0])
    finally:
        os.close(fd)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Returns a tensor's bytes in row order, without a copy if it is on the CPU in that order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_all(fd: int, data: memoryview, position: int) -> None:
    """Writes bytes at an offset of a file."""
    while data:
        # Linux writes at most 2 GiB at once, a full disk any smaller part.
        count = os.pwrite(fd, data, position)
        data = data[count:]
        position += count
