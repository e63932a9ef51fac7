"""How the graph stores each tensor of a model: its type, its bytes, and the formats of rounded matrices. Torch-free."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from refold.blueprint.integers import Scheme
from refold.blueprint.kinds import EMBEDDING, HEAD, TargetTensor
from refold.blueprint.quantisation import is_quantised
from refold.blueprint.schema import Blueprint
from refold.blueprint.tensors import float_tensors
from refold.checkpoint.headers import DTYPE_BYTES
from refold.errors import ExportError
from refold.exporting.stored_schemes import BLOCK, describe_floats, holds
from refold.exporting.target import DTYPES, ExportOptions
from refold.suggest import must_be_one_of


@dataclass(frozen=True)
class BlockFormat:
    """Matrices of integers in blocks of 32 inputs, each block with a float16 scale; `zero` stands for 0.

    Attributes:
        name: The value of `--quantise`.
        bits: Width of the integers.
    """

    name: str
    bits: int

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1)

    def num_bytes(self, rows: int, columns: int) -> int:
        """Returns the bytes of a matrix `[rows, columns]`, whose rows are padded to whole blocks."""
        return rows * -(-columns // BLOCK) * (BLOCK * self.bits // 8 + 2)


FORMATS = {each.name: each for each in (BlockFormat("int8", 8), BlockFormat("int4", 4))}
"""All formats by name, most precise first."""
GROUPS = {"embeddings": EMBEDDING, "head": HEAD}
"""Names that `--keep` takes beside patterns. A head that is tied to the embeddings has their format."""


class Storage:
    """Chooses the type of each tensor.

    Args:
        blueprint: The stack.
        options: With the dtype set.

    Raises:
        ExportError: `keep` names no tensor, or an unknown format.
    """

    def __init__(self, blueprint: Blueprint, options: ExportOptions):
        assert options.dtype is not None
        self._blueprint, self._options, self._dtype = blueprint, options, options.dtype
        self._tensors = {tensor.name: tensor for tensor in float_tensors(blueprint)}
        for pattern, kind in options.keep.items():
            if kind not in (*FORMATS, *DTYPES):
                raise ExportError(f"export: keep.{pattern}: {must_be_one_of(kind, (*FORMATS, *DTYPES))}")
            if pattern not in GROUPS and not any(fnmatchcase(name, pattern) for name in self._tensors):
                raise ExportError(
                    f"export: keep: a group ({', '.join(GROUPS)}) or a pattern of tensor names is required "
                    f"(got {pattern!r}, which no tensor matches); `refold inspect` shows the names"
                )

    @property
    def tensors(self) -> Mapping[str, TargetTensor]:
        """All tensors of the model by name, exits included."""
        return self._tensors

    def type_of(self, name: str) -> str:
        """Returns the type of a tensor: a format of `FORMATS`, or a float type."""
        tensor = self._tensors[name]
        if len(tensor.shape) != 2:
            return self._dtype
        for pattern, kind in self._options.keep.items():
            is_meant = tensor.kind is GROUPS[pattern] if pattern in GROUPS else fnmatchcase(name, pattern)
            if is_meant:
                return kind
        is_rounded = tensor.kind in GROUPS.values() or is_quantised(self._blueprint, tensor)
        if is_rounded and self._options.keeps_integers:
            return self._stored_format(tensor) or self._dtype
        return (self._options.quantise if is_rounded else None) or self._dtype

    def format_of(self, name: str) -> BlockFormat | None:
        """Returns the format of a rounded tensor; None for one that is not rounded."""
        return FORMATS.get(self.type_of(name))

    def scheme_of(self, name: str) -> Scheme | None:
        """Returns the scheme by which the model stores a tensor; None: floats."""
        return self._tensors[name].scheme(self._blueprint)

    def notes(self) -> list[str]:
        """Returns sentences about the formats of tensors that the model stores as integers."""
        if not self._options.keeps_integers:
            return []
        counts, lost = Counter[str](), list[TargetTensor]()
        for name, tensor in self._tensors.items():
            if tensor.kind.place == "exits" or self.scheme_of(name) is None:
                continue
            format = self.format_of(name)
            if format is None:
                lost.append(tensor)
            else:
                counts[format.name] += 1
        told = " and ".join(f"{count} in {name}" for name, count in counts.items())
        found = [f"{told}, the formats of the model's integers; --quantise float writes floats"] if told else []
        if lost:
            names = {tensor.scheme_name(self._blueprint) or "" for tensor in lost}
            pieces = [
                piece.piece.num_bytes
                for tensor in lost
                if (scheme := tensor.scheme(self._blueprint)) is not None
                for piece in tensor.stored_as(scheme)
                if piece.piece is not None
            ]
            found.append(describe_floats(names, len(lost), sum(pieces), sum(map(self._num_bytes, lost))))
        return found

    def count_bytes(self) -> int:
        """Returns the bytes of all tensors that the graph has: those of exits are dropped."""
        return sum(self._num_bytes(tensor) for tensor in self._tensors.values() if tensor.kind.place != "exits")

    def _stored_format(self, tensor: TargetTensor) -> str | None:
        """Returns the smallest format that holds the integers of a tensor; None: there are none, or no format does."""
        scheme = tensor.scheme(self._blueprint)
        if scheme is None:
            return None
        return next((each.name for each in reversed(FORMATS.values()) if holds(each.bits, scheme)), None)

    def _num_bytes(self, tensor: TargetTensor) -> int:
        format = self.format_of(tensor.name)
        if format is not None:
            rows, columns = tensor.shape
            return format.num_bytes(rows, columns)
        return tensor.num_elements * DTYPE_BYTES[self.type_of(tensor.name)]
