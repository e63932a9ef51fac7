"""One safetensors file: where its tensors lie, and how it is written without a second copy of them in memory."""

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
    """Returns the head of a file with these tensors, and each one's first and last byte in the file.

    Args:
        specs: The tensors.
        header: What stands in the head besides, such as `__metadata__`.
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
    """Writes a file. `safetensors.torch.save_file` makes the whole of it in memory first, which doubles what is held.

    Args:
        path: Replaced where it is there.
        tensors: By name.
        metadata: Texts to keep with them.
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
    """Returns a tensor's bytes in row order, where it lies on the CPU in that order without a copy."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_all(fd: int, data: memoryview, position: int) -> None:
    """Writes bytes at a place in a file."""
    while data:
        # Linux writes at most 2 GiB at once, a full disk any smaller part.
        count = os.pwrite(fd, data, position)
        data = data[count:]
        position += count
