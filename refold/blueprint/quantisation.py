"""Weight-only quantisation schemes: width of the integers, size of the groups, and bytes of the result."""

from math import ceil

from refold.blueprint.kinds import TargetTensor
from refold.blueprint.schema import Blueprint
from refold.blueprint.tensors import target_tensors
from refold.errors import RefoldError
from refold.families.arch import Frozen
from refold.suggest import must_be_one_of

SCALE_BYTES = 2  # bfloat16


class Scheme(Frozen):
    """A scheme that stores weights of linears as integers, packed inside a row without gaps, with one scale per group.

    With a zero point (one integer of the same width per group) the range of a group need not be symmetric; without, the
    range is symmetric about zero. Embedding, head, norms, biases and LoRAs beside a stored weight keep their dtype.
    """

    bits: int
    group: int | None
    """Number of neighbours in a row (inputs) that share a scale; the last group may be smaller. None: the whole row."""
    has_zero_point: bool

    def num_bytes(self, rows: int, columns: int) -> int:
        """Returns the bytes of one weight `[rows, columns]`: integers, scales and zero points."""
        groups = 1 if self.group is None else ceil(columns / self.group)
        zero_points = ceil(groups * self.bits / 8) if self.has_zero_point else 0
        return rows * (ceil(columns * self.bits / 8) + groups * SCALE_BYTES + zero_points)


SCHEMES = {
    "int8": Scheme(bits=8, group=None, has_zero_point=False),
    "int4": Scheme(bits=4, group=32, has_zero_point=True),
}
"""All schemes by name, most precise first."""


def find_scheme(name: str) -> Scheme:
    """Returns the scheme with a name.

    Raises:
        RefoldError: No scheme has this name.
    """
    if name not in SCHEMES:
        raise RefoldError(f"quantise: {must_be_one_of(name, tuple(SCHEMES))}")
    return SCHEMES[name]


def is_quantised(blueprint: Blueprint, tensor: TargetTensor) -> bool:
    """Says whether a tensor is quantised: the weight of a linear, or a factor of it, in a part or at a depth.

    LoRA factors count as quantised weights only where the linear has no stored weight of its own.
    """
    return tensor.kind.is_quantised(blueprint, tensor)


def quantised_bytes(blueprint: Blueprint, dtype_bytes: int, scheme: Scheme) -> int:
    """Returns the weight bytes of a blueprint after quantisation.

    Args:
        blueprint: The blueprint; `is_quantised` selects the tensors.
        dtype_bytes: Bytes of one number in all other tensors.
        scheme: The quantisation scheme.
    """
    total = 0
    for tensor in target_tensors(blueprint):
        if is_quantised(blueprint, tensor):
            rows, columns = tensor.shape
            total += scheme.num_bytes(rows, columns)
        else:
            total += tensor.num_elements * dtype_bytes
    return total
