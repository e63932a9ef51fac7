"""Number formats of GGUF tensors whose integers the model stores already; torch-free."""

from collections import Counter
from typing import NamedTuple

from refold.blueprint.integers import SCHEMES, Scheme
from refold.blueprint.schema import Blueprint
from refold.exporting.gguf.contents import GgufContents, GgufTensor
from refold.exporting.gguf.number_formats import DTYPE_FORMATS, count_tensor_bytes
from refold.exporting.stored_schemes import StoredSchemes, describe_floats, describe_wider, holds
from refold.exporting.target import ExportOptions

BITS = {"q4_0": 4, "q8_0": 8}
"""Width of the integers in the formats with signed blocks of 32 and one scale, smallest first."""


class StoredFormats(NamedTuple):
    """The formats that hold a model's integers, by tensor name, and sentences about them."""

    by_name: dict[str, str]
    notes: tuple[str, ...] = ()


def stored_formats(contents: GgufContents, blueprint: Blueprint, options: ExportOptions) -> StoredFormats:
    """Returns the formats for an export that keeps the integers of the model; nothing for other exports.

    A tensor of several weights gets the smallest format that holds all of them. Weights that are merged with LoRAs, or
    multiplied out, get the format of their stored tensor. Matrices of zeros get the commonest format.
    """
    if not options.keeps_integers:
        return StoredFormats({})
    stored = StoredSchemes(blueprint)
    found: dict[str, str] = {}
    empty: list[str] = []
    num_merged, lost, wider = 0, _Lost(options), _Wider()
    for tensor in contents.tensors:
        if tensor.is_float32:
            continue
        weights = [weight for piece in tensor.pieces if (weight := stored.find(piece.canonical, piece.depth))]
        schemes = [weight.scheme for weight in weights if weight.scheme is not None]
        if not weights:
            empty.append(tensor.name)
        elif len(schemes) == len(weights):
            name = next((name for name, bits in BITS.items() if all(holds(bits, each) for each in schemes)), None)
            if name is None:
                lost.add(tensor, schemes)
            else:
                found[tensor.name] = name
                wider.add(tensor, name, schemes)
                num_merged += not all(weight.is_whole for weight in weights)
    counts = Counter(found.values())
    if counts:
        found |= dict.fromkeys(empty, counts.most_common(1)[0][0])
    notes = lost.notes()
    if counts:
        told = " and ".join(f"{count} in {name}" for name, count in counts.items())
        notes.insert(0, f"{told}, the formats of the model's integers; --quantise float writes floats")
    notes += wider.notes()
    if num_merged:
        notes.append(f"{num_merged} matrices are rounded again: LoRAs are merged in, or factors multiplied out")
    return StoredFormats(found, tuple(notes))


class _Wider:
    """Tensors whose schemes have fewer bits than their format."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._count = self._stored_bytes = self._held_bytes = 0

    def add(self, tensor: GgufTensor, format: str, schemes: list[Scheme]) -> None:
        # A tensor of several weights may have narrower ones among them.
        if max(each.bits for each in schemes) == BITS[format]:
            return
        self._names |= {name for name, scheme in SCHEMES.items() if scheme in schemes}
        self._count += 1
        rows, columns = tensor.shape
        self._stored_bytes += max(scheme.num_bytes(rows, columns) for scheme in schemes)
        self._held_bytes += count_tensor_bytes(tensor, format)

    def notes(self) -> list[str]:
        if not self._count:
            return []
        return [describe_wider(self._names, self._count, self._stored_bytes, self._held_bytes)]


class _Lost:
    """Tensors whose schemes have no format."""

    def __init__(self, options: ExportOptions):
        assert options.dtype is not None
        self._format = DTYPE_FORMATS[options.dtype]
        self._names: set[str] = set()
        self._count = self._stored_bytes = self._float_bytes = 0

    def add(self, tensor: GgufTensor, schemes: list[Scheme]) -> None:
        self._names |= {name for name, scheme in SCHEMES.items() if scheme in schemes}
        self._count += 1
        rows, columns = tensor.shape
        self._stored_bytes += max(scheme.num_bytes(rows, columns) for scheme in schemes)
        self._float_bytes += count_tensor_bytes(tensor, self._format)

    def notes(self) -> list[str]:
        if not self._count:
            return []
        return [describe_floats(self._names, self._count, self._stored_bytes, self._float_bytes)]
