"""One GGUF file: its metadata and the places of its tensors. The file is not trusted; torch-free.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import array
import hashlib
import math
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from refold.checkpoint.gguf.block_types import BLOCK_TYPES, REMOVED
from refold.checkpoint.headers import TensorInfo
from refold.checkpoint.source_file import open_file
from refold.errors import SourceError

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# No model on the hub reaches a tenth of these; each is checked before memory is taken.
MAX_KEYS, MAX_TENSORS = 1 << 16, 1 << 20
MAX_TEXT_BYTES, MAX_ITEMS = 1 << 24, 1 << 24
MAX_HEADER_BYTES = 1 << 29
MAX_DIMENSIONS = 4
MAX_SIZE = 1 << 40
MAX_NAME_BYTES = 128

_AGAIN = "download or convert it again"
_BLOCK_BYTES = 1 << 20
_FLOAT32_MAX = 3.4e38
_TEXT, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""`struct` letters of the number types of metadata."""
_OLD_FORMATS = (b"lmgg", b"fmgg", b"tjgg", b"algg")

Scalar = str | int | float | bool
MetadataValue = Scalar | tuple[Scalar, ...]


@dataclass(frozen=True)
class GgufFile:
    """One file.

    Attributes:
        metadata: Values by key; numbers of 32 bits have the shortest decimal that rounds to them.
        tensors: Place of each tensor by its name in the file, in file order. The shape has the order of torch: rows
            first. The dtype is the type's name in llama.cpp.
        num_bytes: Size of the file.
        metadata_sha256: Hash of the bytes of the metadata.
        tensors_sha256: Hash of the bytes that describe the tensors.
    """

    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, TensorInfo]
    num_bytes: int
    metadata_sha256: str
    tensors_sha256: str


def read_gguf(path: Path) -> GgufFile:
    """Reads and checks the header of a file.

    Raises:
        SourceError: The file is no GGUF file of a known version, is truncated, or its header contradicts itself.
    """
    with open_file(path) as file:
        try:
            return _Parser(file, path).parse()
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({error.strerror}); check the file") from None


class _Parser:
    """Reads a header from front to back; no read goes past the end of the file."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path = file, path
        self._size = os.fstat(file.fileno()).st_size
        self._position = 0

    def parse(self) -> GgufFile:
        self._check_magic()
        self._check_version(self._take(4, "the version"))
        num_tensors = self._number("Q", "the number of tensors")
        num_keys = self._number("Q", "the number of metadata keys")
        # An entry takes at least 13 bytes of metadata or 24 bytes of tensor description.
        self._check_count(num_keys, min(MAX_KEYS, self._size // 13), "metadata keys")
        self._check_count(num_tensors, min(MAX_TENSORS, self._size // 24), "tensors")
        metadata_start = self._position
        metadata = self._read_metadata(num_keys)
        tensors_start = self._position
        described = self._read_descriptions(num_tensors)
        end = self._position
        return GgufFile(
            metadata=metadata,
            tensors=self._place(described, self._alignment(metadata), end),
            num_bytes=self._size,
            metadata_sha256=self._hash(metadata_start, tensors_start),
            tensors_sha256=self._hash(tensors_start, end),
        )

    def _check_magic(self) -> None:
        magic = self._take(4, "the mark GGUF at its beginning")
        if magic in _OLD_FORMATS:
            raise self._fault(
                f"a GGUF file is required (got {magic[::-1].decode()}, an older format of llama.cpp)",
                "convert it with a current llama.cpp",
            )
        if magic != b"GGUF":
            raise self._fault("a GGUF file is required (it does not begin with the mark GGUF)", "check the path")

    def _check_version(self, raw: bytes) -> None:
        (version,) = struct.unpack("<I", raw)
        if version in VERSIONS:
            return
        known = " or ".join(map(str, VERSIONS))
        if struct.unpack(">I", raw)[0] in (1, *VERSIONS):
            raise self._fault(
                "numbers in little-endian order are required (got a big-endian file)",
                "convert it with gguf_convert_endian of the gguf package",
            )
        raise self._fault(f"GGUF version {known} is required (got {version})", "convert it with a current llama.cpp")

    def _read_metadata(self, num_keys: int) -> dict[str, MetadataValue]:
        metadata: dict[str, MetadataValue] = {}
        for _ in range(num_keys):
            key = self._text("a metadata key", strict=True)
            if key in metadata:
                raise self._fault(f"each metadata key is required once (got {_shown(key)} twice)")
            metadata[key] = self._value(key)
            if self._position > MAX_HEADER_BYTES:
                raise self._fault(f"metadata must be at most {MAX_HEADER_BYTES:,} bytes (got more at {_shown(key)})")
        return metadata

    def _value(self, key: str) -> MetadataValue:
        kind = self._number("I", f"the type of {_shown(key)}")
        if kind == _TEXT:
            return self._text(_shown(key))
        if kind in _NUMBERS:
            value = self._numbers(kind, 1, key)[0]
            return shortest_float32(value) if kind == 6 else value
        if kind != _ARRAY:
            raise self._fault(f"metadata {_shown(key)}: type must be at most 12 (got {kind})")
        kind, count = self._number("I", f"the type of {_shown(key)}"), self._number("Q", f"the length of {_shown(key)}")
        if kind == _ARRAY:
            raise self._fault(f"metadata {_shown(key)}: a list of numbers or texts is required (got a list of lists)")
        if kind != _TEXT and kind not in _NUMBERS:
            raise self._fault(f"metadata {_shown(key)}: type must be at most 12 (got {kind})")
        least = 8 if kind == _TEXT else struct.calcsize(_NUMBERS[kind])
        self._check_count(count, min(MAX_ITEMS, (self._size - self._position) // least), f"items of {_shown(key)}")
        if kind == _TEXT:
            return tuple(self._text(_shown(key)) for _ in range(count))
        return self._numbers(kind, count, key)

    def _numbers(self, kind: int, count: int, key: str) -> tuple[Any, ...]:
        letter = _NUMBERS[kind]
        raw = self._take(struct.calcsize(letter) * count, _shown(key))
        if kind == _BOOL:
            if raw.strip(b"\0\1"):
                raise self._fault(f"metadata {_shown(key)}: 0 or 1 is required for true or false (got {max(raw)})")
            return tuple(map(bool, raw))
        values = array.array(letter)
        values.frombytes(raw)
        if sys.byteorder == "big":
            values.byteswap()
        return tuple(values)

    def _read_descriptions(self, num_tensors: int) -> dict[str, "_Description"]:
        found: dict[str, _Description] = {}
        for _ in range(num_tensors):
            name = self._text("a tensor name", strict=True, most=MAX_NAME_BYTES)
            if name in found:
                raise self._fault(f"each tensor is required once (got {_shown(name)} twice)")
            found[name] = self._read_description(name)
        return found

    def _read_description(self, name: str) -> "_Description":
        shown = _shown(name)
        num_dimensions = self._number("I", f"the shape of {shown}")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self._fault(f"tensor {shown}: 1 to {MAX_DIMENSIONS} dimensions are required (got {num_dimensions})")
        sizes = struct.unpack(f"<{num_dimensions}Q", self._take(8 * num_dimensions, f"the shape of {shown}"))
        if not all(0 < size < MAX_SIZE for size in sizes):
            raise self._fault(f"tensor {shown}: sizes from 1 to {MAX_SIZE:,} are required (got {list(sizes)})")
        kind = self._number("I", f"the type of {shown}")
        if kind not in BLOCK_TYPES:
            got = f"{REMOVED[kind]}, which llama.cpp no longer reads" if kind in REMOVED else f"type {kind}"
            raise self._fault(f"tensor {shown}: a known number type is required (got {got})", "quantise it again")
        block = BLOCK_TYPES[kind]
        if sizes[0] % block.num_elements:
            raise self._fault(
                f"tensor {shown}: rows of {block.name} must be a multiple of {block.num_elements} wide (got {sizes[0]})"
            )
        num_bytes = math.prod(sizes) // block.num_elements * block.num_bytes
        # The file has the fastest dimension first.
        return _Description(block.name, sizes[::-1], self._number("Q", f"the offset of {shown}"), num_bytes)

    def _alignment(self, metadata: Mapping[str, MetadataValue]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._fault(f"metadata general.alignment: a power of two is required (got {str(alignment)[:40]})")
        return alignment

    def _place(self, described: Mapping[str, "_Description"], alignment: int, end: int) -> dict[str, TensorInfo]:
        """Returns the places of the tensors, which must lie side by side, padded to `alignment`, as for llama.cpp."""
        base = _padded(end, alignment)
        placed: dict[str, TensorInfo] = {}
        position = 0
        for name, each in sorted(described.items(), key=lambda item: item[1].offset):
            if each.offset != position:
                fault = "overlaps the one before" if each.offset < position else "leaves a gap before it"
                raise self._fault(
                    f"tensors side by side are required ({_shown(name)} {fault}: starts at {each.offset}, expected "
                    f"{position})"
                )
            start = base + each.offset
            if start + each.num_bytes > self._size:
                raise self._fault(f"truncated: {start + each.num_bytes:,} bytes are required (got {self._size:,})")
            placed[name] = TensorInfo(each.type, each.shape, self._path.name, start, start + each.num_bytes)
            position = _padded(each.offset + each.num_bytes, alignment)
        return placed

    def _text(self, subject: str, strict: bool = False, most: int = MAX_TEXT_BYTES) -> str:
        length = self._number("Q", subject)
        if length > most:
            raise self._fault(f"{subject} must be at most {most:,} bytes long (got {length:,})")
        raw = self._take(length, subject)
        try:
            # A token may be a part of a character; a name may not.
            return raw.decode("utf-8", "strict" if strict else "replace")
        except UnicodeDecodeError:
            raise self._fault(f"{subject} in UTF-8 is required (got {raw[:40]!r})") from None

    def _number(self, letter: str, subject: str) -> int:
        return struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}"), subject))[0]

    def _take(self, count: int, subject: str) -> bytes:
        self._position += count
        if self._position > self._size:
            raise self._fault(f"truncated: {subject} needs {self._position:,} bytes (got {self._size:,})")
        raw = self._file.read(count)
        if len(raw) != count:
            raise self._fault(f"truncated: {subject} cannot be read whole")
        return raw

    def _check_count(self, count: int, most: int, subject: str) -> None:
        if count > most:
            raise self._fault(f"at most {most:,} {subject} are possible in this file (got {count:,})")

    def _hash(self, start: int, end: int) -> str:
        digest = hashlib.sha256()
        self._file.seek(start)
        for place in range(start, end, _BLOCK_BYTES):
            digest.update(self._file.read(min(_BLOCK_BYTES, end - place)))
        return digest.hexdigest()

    def _fault(self, reason: str, mend: str = _AGAIN) -> SourceError:
        return SourceError(f"{self._path}: {reason}; {mend}")


class _Description(NamedTuple):
    """A tensor as the header describes it; `offset` counts from the beginning of the data."""

    type: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def shortest_float32(value: float) -> float:
    """Returns the shortest decimal that rounds to a number of 32 bits: 1e-05 for 9.99999974737875e-06."""
    if not math.isfinite(value):
        return value
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if abs(short) < _FLOAT32_MAX and struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _padded(position: int, alignment: int) -> int:
    return position + -position % alignment


def _shown(name: str) -> str:
    return repr(name[:60]) if not name.isprintable() or " " in name else name[:60]
