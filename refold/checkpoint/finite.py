"""The check that all numbers of a tensor are finite, when it is read, loaded or written."""

import math

import torch
from torch import Tensor

from refold.errors import RefoldError

_CAST_HINT = {
    torch.float16: "values above 65,504 overflow float16: store the model in bfloat16 or float32",
    torch.bfloat16: "values above 3.39e38 overflow bfloat16",
}


def first_not_finite(tensor: Tensor) -> tuple[tuple[int, ...], float] | None:
    """Returns position and value of the first entry that is NaN or infinite; None if all are finite.

    One pass without a copy: minimum and maximum are finite only if every entry is.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel() or tensor.is_meta:
        return None
    numbers = tensor.detach()
    if numbers.is_complex() or numbers.element_size() == 1:
        numbers = torch.view_as_real(numbers) if numbers.is_complex() else numbers.float()
    lowest, highest = (float(each) for each in torch.aminmax(numbers))
    if math.isfinite(lowest) and math.isfinite(highest):
        return None
    flat = int((~torch.isfinite(numbers)).reshape(-1).to(torch.uint8).argmax())
    position = tuple(int(each) for each in torch.unravel_index(torch.tensor(flat), numbers.shape))
    return position, float(numbers[position])


def require_finite(tensor: Tensor, name: str, where: str, error: type[RefoldError], mend: str) -> None:
    """Checks that every number of a tensor is finite.

    Args:
        tensor: The tensor; a tensor of integers passes.
        name: Its name in the message.
        where: The folder in the message.
        error: Class of the error.
        mend: Remedy at the end of the message.

    Raises:
        RefoldError: An entry is NaN or infinite; the message names its position.
    """
    found = first_not_finite(tensor)
    if found is None:
        return
    position, value = found
    shown = ", ".join(map(str, position))
    hint = _CAST_HINT.get(tensor.dtype) if math.isinf(value) else None
    raise error(
        f"{where}: {name}: finite numbers are required (got {value} at [{shown}]); {mend if hint is None else hint}"
    )
