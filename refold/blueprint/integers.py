"""Schemes by which weights are stored as integers: bits, groups, and the tensors that hold one weight."""

from math import ceil, prod
from typing import Annotated, NamedTuple

from pydantic import AfterValidator

from refold.errors import RefoldError
from refold.families.arch import Frozen
from refold.suggest import must_be_one_of

WORD_BITS = 32
DTYPE_BYTES = {"int32": 4, "int64": 8, "bfloat16": 2}


class StoredPiece(NamedTuple):
    """One of the tensors that hold a quantised weight.

    Attributes:
        suffix: Appended to the weight's name: `_packed`, `_scale`, `_zero_point` or `_shape`.
        shape: Shape of the tensor.
        dtype: Its torch name.
    """

    suffix: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class Scheme(Frozen):
    """A scheme that stores weights as integers of `bits` bits without gaps in a row, with one scale per group.

    With a zero point (one integer of the same width per group) the range of a group need not be symmetric; without, the
    range is symmetric about zero. A group without a zero point uses all `2**bits` integers, and its scale may be
    negative: the number that is farthest from zero gets the smallest integer, as in llama.cpp's q4_0. The tensors are
    those of compressed-tensors' format `pack-quantized`.
    """

    bits: int
    group: int | None
    """Number of neighbours in a row (inputs) that share a scale; the last group may be smaller. None: the whole row."""
    has_zero_point: bool

    def num_groups(self, columns: int) -> int:
        """Returns the number of groups in a row."""
        return 1 if self.group is None else ceil(columns / self.group)

    def pieces(self, rows: int, columns: int) -> tuple[StoredPiece, ...]:
        """Returns the tensors that hold one weight `[rows, columns]`, in storage order."""
        groups = self.num_groups(columns)
        found = [
            StoredPiece("_packed", (rows, ceil(columns * self.bits / WORD_BITS)), "int32"),
            StoredPiece("_scale", (rows, groups), "bfloat16"),
        ]
        if self.has_zero_point:
            # Packed along the rows: a row has few groups.
            found.append(StoredPiece("_zero_point", (ceil(rows * self.bits / WORD_BITS), groups), "int32"))
        return (*found, StoredPiece("_shape", (2,), "int64"))

    def num_bytes(self, rows: int, columns: int) -> int:
        """Returns the bytes of one weight `[rows, columns]`: integers, scales, zero points and shape."""
        return sum(piece.num_bytes for piece in self.pieces(rows, columns))


SCHEMES = {
    "int8": Scheme(bits=8, group=None, has_zero_point=False),
    "int4": Scheme(bits=4, group=32, has_zero_point=False),
    "int4z": Scheme(bits=4, group=32, has_zero_point=True),
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


def _known_scheme(name: str) -> str:
    if name not in SCHEMES:
        raise ValueError(must_be_one_of(name, tuple(SCHEMES)))
    return name


SchemeName = Annotated[str, AfterValidator(_known_scheme)]
"""Name of a scheme in `SCHEMES`."""
