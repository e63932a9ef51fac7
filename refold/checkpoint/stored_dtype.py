"""The dtype of a checkpoint: the dtype of most stored numbers, or of the config if there are no weights."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from refold.checkpoint.headers import CheckpointHeaders
from refold.errors import SourceError
from refold.suggest import must_be_one_of

STORED_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Torch name of each dtype that weights may have, by its safetensors name."""
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def stored_dtype(where: str, headers: CheckpointHeaders, names: Collection[str] | None = None) -> str:
    """Returns the torch name of the dtype that most stored numbers have.

    Args:
        where: The checkpoint's name in messages.
        headers: Headers of its tensors.
        names: Tensors that count; None: all.

    Raises:
        SourceError: A tensor that counts has no plain float dtype.
    """
    sizes: Counter[str] = Counter()
    for name, info in headers.tensors.items():
        if names is None or name in names:
            if info.dtype not in STORED_DTYPES:
                raise SourceError(
                    f"{where}: {name}: dtype must be one of {', '.join(STORED_DTYPES)} (got {info.dtype}); "
                    f"dequantise it first, or take the original"
                )
            sizes[STORED_DTYPES[info.dtype]] += info.num_elements
    return sizes.most_common(1)[0][0] if sizes else "bfloat16"


def config_dtype(config: Mapping[str, Any]) -> str:
    """Returns the torch name of the dtype in a config, for a folder without weights.

    Raises:
        SourceError: The config names no dtype, or one that weights may not have.
    """
    given = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if given not in DTYPE_BYTES:
        raise SourceError(f"config.json: dtype: {must_be_one_of(given[:60], DTYPE_BYTES)}")
    return given
