"""Weight-only quantisation: how wide the integers are, what shares a scale, and how many bytes that makes."""

from math import ceil

from refold.blueprint.schema import Blueprint
from refold.blueprint.tensor_kind import TargetTensor
from refold.blueprint.tensors import target_tensors
from refold.errors import RefoldError
from refold.families.arch import Frozen
from refold.suggest import must_be_one_of

SCALE_BYTES = 2  # bfloat16


class Scheme(Frozen):
    """Linears' weights as integers, packed without gaps inside a row, each group of a row's numbers with one scale.

    With a zero point, an integer of the same width for each group, a group's range lies where its numbers do; without,
    it is centred on zero. Embedding, head, norms, biases and LoRAs beside a stored weight are left as they are.
    """

    bits: int
    group: int | None
    """Neighbours in a row (inputs) that share a scale; the last group may be smaller. None: the whole row."""
    has_zero_point: bool

    def num_bytes(self, rows: int, columns: int) -> int:
        """Bytes of one weight `[rows, columns]`: integers, scales and zero points."""
        groups = 1 if self.group is None else ceil(columns / self.group)
        zero_points = ceil(groups * self.bits / 8) if self.has_zero_point else 0
        return rows * (ceil(columns * self.bits / 8) + groups * SCALE_BYTES + zero_points)


SCHEMES = {
    "int8": Scheme(bits=8, group=None, has_zero_point=False),
    "int4": Scheme(bits=4, group=32, has_zero_point=True),
}
"""By the name a user gives, most precise first."""


def find_scheme(name: str) -> Scheme:
    """Returns the scheme of a name.

    Raises:
        RefoldError: There is none.
    """
    if name not in SCHEMES:
        raise RefoldError(f"quantise: {must_be_one_of(name, tuple(SCHEMES))}")
    return SCHEMES[name]


def is_quantised(blueprint: Blueprint, tensor: TargetTensor) -> bool:
    """Says whether a tensor is the weight of a linear, whole or one of its two factors, wherever it is kept.

    LoRA factors count as quantised weights only where the linear has no stored weight of its own.
    """
    return tensor.kind.is_quantised(blueprint, tensor)


def quantised_bytes(blueprint: Blueprint, dtype_bytes: int, scheme: Scheme) -> int:
    """Weight bytes of a blueprint whose linears are quantised.

    Args:
        blueprint: Its linears are those of `is_quantised`.
        dtype_bytes: Bytes of one number of all other tensors.
        scheme: How.
    """
    total = 0
    for tensor in target_tensors(blueprint):
        if is_quantised(blueprint, tensor):
            rows, columns = tensor.shape
            total += scheme.num_bytes(rows, columns)
        else:
            total += tensor.num_elements * dtype_bytes
    return total
