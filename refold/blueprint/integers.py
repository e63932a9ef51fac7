"""Schemes by which weights are stored as integers: bits, groups, and the tensors that hold one weight."""

from itertools import product
from math import ceil, prod
from typing import Annotated, NamedTuple

from pydantic import AfterValidator

from refold.errors import RefoldError
from refold.families.arch import Frozen
from refold.suggest import did_you_mean, shorten

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
    negative: the number that is farthest from zero gets the smallest integer, as in llama.cpp's q4_0. With 2 bits its
    four values are -3/2, -1/2, 1/2 and 3/2 times the scale instead: with a zero among four values one side has a single
    value. The tensors are those of compressed-tensors' format `pack-quantized`.
    """

    bits: int
    group: int | None
    """Number of neighbours in a row (inputs) that share a scale; the last group may be smaller. None: the whole row."""
    has_zero_point: bool

    @property
    def middle(self) -> float:
        """The zero point of a scheme without zero points: between two integers for 2 bits, 0 for whole rows."""
        if self.group is None:
            return 0.0
        return 2.0 ** (self.bits - 1) - (0.5 if self.bits == 2 and not self.has_zero_point else 0.0)

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


WIDTHS = (8, 6, 5, 4, 3, 2)
"""Bits of an integer, most precise first."""
GROUPS = (32, 64, 128)
"""Numbers of neighbours that share a scale; a name without `g` means the first."""


def _names() -> dict[str, Scheme]:
    found = {"int8": Scheme(bits=8, group=None, has_zero_point=False)}
    for bits, group, has_zero_point in product(WIDTHS[1:], GROUPS, (False, True)):
        name = f"int{bits}{'z' * has_zero_point}{'' if group == GROUPS[0] else f'g{group}'}"
        found[name] = Scheme(bits=bits, group=group, has_zero_point=has_zero_point)
    return found


SCHEMES = _names()
"""All schemes by name: `int` and the bits, `z` with zero points, `g64` or `g128` for groups of another size than 32.
`int8` has one scale for each row. Most bits first."""
COMMON_SCHEMES = ("int8", "int4", "int4z")
"""Schemes that have kernels on a CPU, and that other programs read too."""
FIT_SCHEMES = (
    "int8",
    "int6zg128",
    "int6g128",
    "int5zg128",
    "int5g128",
    "int4g64",
    "int4g128",
    "int3g64",
    "int3g128",
    "int2g64",
    "int2g128",
)
"""Schemes that a fit chooses from, most precise first: those near the hull of error against bytes on a measured model.
Those with zero points have a twin without, which GGUF holds too."""
NAME_RULE = "int8, or int2 to int6 with z for zero points and g64 or g128 for groups wider than 32, such as int3g128"


def find_scheme(name: str) -> Scheme:
    """Returns the scheme with a name.

    Raises:
        RefoldError: No scheme has this name.
    """
    if name not in SCHEMES:
        raise RefoldError(f"quantise: {must_be_scheme(name)}")
    return SCHEMES[name]


def must_be_scheme(name: object, *others: str) -> str:
    """Returns `must be the name of a scheme (got 'x')`, with the rule for names and the closest name.

    Args:
        name: The name that is none.
        others: Further names that are legal, such as `float`.
    """
    rule = "".join(f"{other}, " for other in others) + NAME_RULE
    hint = did_you_mean(name, (*SCHEMES, *others)) if isinstance(name, str) else ""
    return f"must be {rule} (got {shorten(name)}){hint}"


def _known_scheme(name: str) -> str:
    if name not in SCHEMES:
        raise ValueError(must_be_scheme(name))
    return name


SchemeName = Annotated[str, AfterValidator(_known_scheme)]
"""Name of a scheme in `SCHEMES`."""
