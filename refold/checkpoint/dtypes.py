"""The safetensors names of torch's dtypes."""

import torch

from refold.errors import SourceError

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the safetensors name, such as `BF16`."""
    assert dtype in _NAMES, f"{dtype} has no place in safetensors"
    return _NAMES[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype of a safetensors name.

    Raises:
        SourceError: a dtype of the format that torch lacks, such as the packed 4- and 6-bit ones.
    """
    if name not in _DTYPES:
        raise SourceError(f"dtype {name}: a dtype of torch is required; convert the checkpoint to BF16 first")
    return _DTYPES[name]
