"""Number formats of GGUF tensors: bytes, blocks, and the choice for each tensor."""

import fnmatch
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from refold.errors import ExportError
from refold.exporting.gguf.contents import GgufContents, GgufTensor
from refold.exporting.target import ExportOptions
from refold.suggest import must_be_one_of


class NumberFormat(NamedTuple):
    """A format that stores blocks of `block` numbers of a row in `num_bytes` bytes each."""

    block: int
    num_bytes: int
    file_type: int
    """llama.cpp's number for files whose matrices have the format."""


FORMATS: Mapping[str, NumberFormat] = {
    "f32": NumberFormat(1, 4, 0),
    "f16": NumberFormat(1, 2, 1),
    "bf16": NumberFormat(1, 2, 32),
    "q8_0": NumberFormat(32, 34, 7),
    "q4_0": NumberFormat(32, 18, 2),
    "q4_1": NumberFormat(32, 20, 3),
    "q5_0": NumberFormat(32, 22, 8),
    "q5_1": NumberFormat(32, 24, 9),
}
QUANTISATIONS = tuple(name for name, each in FORMATS.items() if each.block > 1)
DTYPE_FORMATS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
GROUPS = {"embeddings": "token_embd.weight", "head": "output.weight"}
"""Tensor by the name of a group in `--keep`."""
ALIGNMENT = 32
"""Each tensor begins at a multiple of this number of bytes."""


class ChosenFormats(NamedTuple):
    """The format by tensor name, and sentences about tensors that got another one than asked for."""

    by_name: dict[str, str]
    notes: tuple[str, ...]

    def commonest(self, contents: GgufContents) -> str:
        """Returns the format of most numbers in matrices."""
        counts: Counter[str] = Counter()
        for tensor in contents.tensors:
            if not tensor.is_float32:
                counts[self.by_name[tensor.name]] += tensor.num_elements
        return counts.most_common(1)[0][0]


def check_formats(keep: Mapping[str, str]) -> None:
    """Checks the formats that a user asked for.

    Raises:
        ExportError: There is no such format.
    """
    for pattern, name in keep.items():
        if name not in FORMATS:
            raise ExportError(f"export: keep: {pattern}: {must_be_one_of(name, FORMATS)}")


def choose_formats(
    contents: GgufContents, options: ExportOptions, stored: Mapping[str, str] | None = None
) -> ChosenFormats:
    """Chooses the format of each tensor.

    Norms, biases and tensors that llama.cpp reads as float32 stay so. A row that a block does not divide is stored in
    f16, as llama.cpp's own quantiser does.

    Args:
        contents: The contents of the file.
        options: With the dtype set.
        stored: Format by name of tensors that keep the model's integers.

    Raises:
        ExportError: A pattern of `keep` fits no tensor, or a tied tensor is asked for in two formats.
    """
    assert options.dtype is not None
    plain = options.quantise or DTYPE_FORMATS[options.dtype]
    wanted = {**(stored or {}), **_wanted(contents, options.keep)}
    chosen, uneven = {}, []
    for tensor in contents.tensors:
        name = "f32" if tensor.is_float32 else wanted.get(tensor.name, plain)
        if tensor.shape[-1] % FORMATS[name].block:
            uneven.append((tensor, name))
            name = "f16"
        chosen[tensor.name] = name
    notes = []
    if uneven:
        widths = ", ".join(sorted({str(tensor.shape[-1]) for tensor, _ in uneven}))
        missed = " and ".join(dict.fromkeys(name for _, name in uneven))
        notes.append(
            f"{len(uneven)} tensors are stored in f16 instead of {missed}: their rows of {widths} numbers are no "
            f"multiple of {FORMATS[QUANTISATIONS[0]].block}, such as {uneven[0][0].name}"
        )
    return ChosenFormats(chosen, tuple(notes))


def count_tensor_bytes(tensor: GgufTensor, name: str) -> int:
    """Returns the bytes of a tensor in a format."""
    block, num_bytes, _ = FORMATS[name]
    return tensor.num_elements // block * num_bytes


def count_file_bytes(contents: GgufContents, options: ExportOptions, stored: Mapping[str, str] | None = None) -> int:
    """Returns the bytes of all tensors in a file, with their alignment; see `choose_formats`."""
    formats = choose_formats(contents, options, stored).by_name
    sizes = [count_tensor_bytes(tensor, formats[tensor.name]) for tensor in contents.tensors]
    return sum(size + -size % ALIGNMENT for size in sizes)


def _wanted(contents: GgufContents, keep: Mapping[str, str]) -> dict[str, str]:
    """Returns the format by tensor name that `keep` asks for; later entries win over earlier ones."""
    matrices = [tensor.name for tensor in contents.tensors if not tensor.is_float32]
    found: dict[str, str] = {}
    is_tied = GROUPS["head"] not in matrices
    if is_tied and len({keep[group] for group in GROUPS if group in keep}) > 1:
        raise ExportError(
            f"export: keep: one format for embeddings and head is required (they are one tensor here; got "
            f"{keep['embeddings']} and {keep['head']}); give one of them"
        )
    for pattern, name in keep.items():
        glob = GROUPS["embeddings"] if is_tied and pattern == "head" else GROUPS.get(pattern, pattern)
        hits = fnmatch.filter(matrices, glob)
        if not hits:
            raise ExportError(
                f"export: keep: a group ({', '.join(GROUPS)}) or a pattern of matrices is required (got {pattern!r}, "
                f"which fits none); patterns are such as blk.*.ffn_down.weight"
            )
        found |= dict.fromkeys(hits, name)
    return found
