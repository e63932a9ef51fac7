"""The dtype of a checkpoint: that of most of its stored numbers; the config's counts only where nothing is stored."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from refold.checkpoint.headers import CheckpointHeaders
from refold.errors import SourceError
from refold.suggest import must_be_one_of

STORED_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Safetensors name to torch name of the dtypes weights may have."""
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def stored_dtype(where: str, headers: CheckpointHeaders, names: Collection[str] | None = None) -> str:
    """Returns the torch name of the dtype that most stored numbers have.

    Args:
        where: The checkpoint, for messages.
        headers: Its tensors.
        names: Those that count; None: all.

    Raises:
        SourceError: A tensor that counts holds no plain floats.
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
    """Returns the torch name of the dtype a config names, for a folder without weights.

    Raises:
        SourceError: It names none that weights may have.
    """
    given = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if given not in DTYPE_BYTES:
        raise SourceError(f"config.json: dtype: {must_be_one_of(given[:60], DTYPE_BYTES)}")
    return given
