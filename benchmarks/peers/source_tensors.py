"""Tensors of a source, for peers that have formats of their own."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open


def read_tensors(folder: Path) -> dict[str, NDArray[np.float32]]:
    """Returns the tensors of a folder of safetensors files, in float32."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                found[name] = np.ascontiguousarray(tensors.get_tensor(name).astype(np.float32))
    return found
