"""Safetensors headers: names, dtypes, shapes and byte ranges of a checkpoint's tensors; torch-free."""

import hashlib
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from refold.checkpoint.gguf.block_types import QUANTISED
from refold.checkpoint.source_file import open_file, parse_object, read_file
from refold.errors import SourceError
from refold.suggest import did_you_mean, must_be_one_of

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}

_AGAIN = "download or save it again"
_PICKLES = ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor: its format's name of the dtype, shape, and bytes `start..end` from the beginning of `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class CheckpointHeaders:
    """All tensors of a checkpoint, in file order, and the size in bytes of each of its files."""

    tensors: dict[str, TensorInfo]
    files: dict[str, int]
    # Identity of the checkpoint: sha256 of the index file, or of the header of a single file.
    sha256: str = field(default="", compare=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data, without headers."""
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        return sum(info.num_elements for info in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """Returns the named tensor's header entry.

        Raises:
            SourceError: no such tensor.
        """
        if name not in self.tensors:
            raise SourceError(f"{name}: no such tensor in the checkpoint{did_you_mean(name, self.tensors)}")
        return self.tensors[name]


def read_headers(folder: Path, *, config_only: bool = False) -> CheckpointHeaders | None:
    """Reads the headers of a checkpoint folder.

    Args:
        folder: A transformers folder with `model.safetensors`, or an index and its shards.
        config_only: Return None instead of an error for a folder without weights.

    Raises:
        SourceError: The folder or a shard is missing, or a file is damaged.
    """
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise SourceError(f"{folder}: a readable folder is required ({error.strerror}); check the path") from None

    return collect_headers(
        str(folder),
        names,
        lambda name: read_file(folder / name),
        lambda files: (read_header_bytes(folder / file) for file in files),
        config_only=config_only,
    )


def collect_headers(
    where: str,
    names: Collection[str],
    read: Callable[[str], bytes],
    read_header: Callable[[Sequence[str]], Iterable[tuple[bytes, int]]],
    *,
    config_only: bool = False,
) -> CheckpointHeaders | None:
    """Combines the headers of all shards, in a folder or on the hub.

    Args:
        where: The folder or hub id, for messages.
        names: The file names there.
        read: Returns the bytes of a small file.
        read_header: Yields, for each file, the bytes of its JSON header and the file's size.
        config_only: Return None instead of an error if there are no weights.
    """
    raw_index = read(INDEX_NAME) if INDEX_NAME in names else b""
    index = _read_index(f"{where}/{INDEX_NAME}", raw_index) if INDEX_NAME in names else None
    if index is None and SINGLE_NAME not in names:
        _require_no_weights(where, names, config_only)
        return None
    files = sorted(set(index.values())) if index is not None else [SINGLE_NAME]
    if index is not None and SINGLE_NAME in names and SINGLE_NAME not in files:
        raise SourceError(
            f"{where}: one checkpoint is required (got {SINGLE_NAME} and {INDEX_NAME} with other shards); "
            f"move away the one you do not mean"
        )
    for file in files:
        if file not in names:
            raise SourceError(f"{where}: shard {file} is required (missing); complete the download or the copy")

    tensors: dict[str, TensorInfo] = {}
    sizes: dict[str, int] = {}
    digest = hashlib.sha256(raw_index)
    for file, (header, file_bytes) in zip(files, read_header(files), strict=True):
        sizes[file] = file_bytes
        if index is None:
            digest.update(header)
        for name, info in parse_header(header, file, file_bytes, where=f"{where}/{file}").items():
            if name in tensors:
                raise SourceError(
                    f"{where}: each tensor is required once (got {name} in {tensors[name].file} and {file}); "
                    f"save the checkpoint again"
                )
            tensors[name] = info
    for name, file in (index or {}).items():
        if name not in tensors or tensors[name].file != file:
            raise SourceError(
                f"{where}/{file}: tensor {name} is required (the index lists it, the shard does not hold it); "
                f"index and shards are of different checkpoints: download or save both again"
            )
    return CheckpointHeaders(tensors, sizes, digest.hexdigest())


def read_header_bytes(path: Path) -> tuple[bytes, int]:
    """Returns a safetensors file's JSON header, unparsed, and the file's size in bytes."""
    with open_file(path) as file:
        try:
            file_bytes = os.fstat(file.fileno()).st_size
            length = header_length(file.read(8), file_bytes, where=str(path))
            return file.read(length), file_bytes
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({error.strerror}); check the file") from None


def header_length(first: bytes, file_bytes: int, *, where: str) -> int:
    """Returns the length of the JSON header that a file's first eight bytes declare, within the file's size."""
    if len(first) < 8:
        raise SourceError(f"{where}: truncated: a header is required (got {len(first)} bytes); {_AGAIN}")
    (length,) = struct.unpack("<Q", first[:8])
    if length > MAX_HEADER_BYTES:
        raise SourceError(
            f"{where}: the header must be at most {MAX_HEADER_BYTES} bytes (got {length}); "
            f"this is not a safetensors file, or a damaged one"
        )
    if 8 + length > file_bytes:
        raise SourceError(f"{where}: truncated: the header needs {8 + length} bytes (got {file_bytes}); {_AGAIN}")
    return length


def parse_header(header: bytes, file: str, file_bytes: int, *, where: str) -> dict[str, TensorInfo]:
    """Parses and checks one file's JSON header.

    Args:
        header: the JSON, without the eight bytes of its length.
        file: the file's name, kept in each `TensorInfo`.
        file_bytes: the whole file's size.
        where: the file, for messages.

    Raises:
        SourceError: not JSON, not of the format, or byte ranges that do not tile the file's data exactly.
    """
    entries = _parse_json(header, where)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise SourceError(f"{where}: __metadata__ of texts is required (got {str(metadata)[:60]}); {_AGAIN}")
    base = 8 + len(header)
    infos = {name: _parse_entry(where, name, entry, file, base) for name, entry in entries.items()}
    ordered = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)))
    position = base
    for name, info in ordered.items():
        if info.start != position:
            fault = "overlaps the one before" if info.start < position else "leaves a gap before it"
            raise SourceError(
                f"{where}: tensors side by side are required ({name} {fault}: starts at {info.start - base}, "
                f"expected {position - base}); the file is damaged: {_AGAIN}"
            )
        position = info.end
    if position > file_bytes:
        raise SourceError(f"{where}: truncated: {position} bytes are required (got {file_bytes}); {_AGAIN}")
    if position < file_bytes:
        raise SourceError(
            f"{where}: {position} bytes are required (got {file_bytes}, {file_bytes - position} too many); "
            f"the file is damaged: {_AGAIN}"
        )
    return ordered


def _parse_entry(where: str, name: str, entry: Any, file: str, base: int) -> TensorInfo:
    legal = (
        isinstance(entry, dict)
        and set(entry) == {"dtype", "shape", "data_offsets"}
        and isinstance(entry["dtype"], str)
        and _is_counts(entry["shape"])
        and _is_counts(entry["data_offsets"])
        and len(entry["data_offsets"]) == 2
    )
    if not legal:
        raise SourceError(
            f"{where}: tensor {name} needs dtype, shape and two data_offsets (got {str(entry)[:80]}); "
            f"the header is damaged: {_AGAIN}"
        )
    dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise SourceError(
            f"{where}: tensor {name} has an unknown dtype (got {dtype[:40]}{did_you_mean(dtype, DTYPE_BITS)}); "
            f"save it in a dtype of the safetensors format"
        )
    required = math.prod(shape) * DTYPE_BITS[dtype]
    if required % 8 or end - start != required // 8:
        raise SourceError(
            f"{where}: tensor {name} of {dtype} {list(shape)} requires {required / 8:.15g} bytes (got {end - start}); "
            f"the header is damaged: {_AGAIN}"
        )
    return TensorInfo(dtype, shape, file, base + start, base + end)


def _is_counts(value: Any) -> bool:
    # 2**63 bounds each number as the format does, so that products stay cheap and messages short.
    return isinstance(value, list) and len(value) < 64 and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _read_index(where: str, raw: bytes) -> dict[str, str]:
    weight_map = _parse_json(raw, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{where}: a weight_map of tensor names to shards is required; {_AGAIN}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith(".safetensors"):
            raise SourceError(f"{where}: {name} must name a .safetensors file beside the index (got {str(file)[:80]})")
    return weight_map


def _parse_json(raw: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    return parse_object(raw, where, _AGAIN, unique)


def _require_no_weights(where: str, names: Collection[str], config_only: bool) -> None:
    loose = sorted(name for name in names if fnmatch(name, "*.safetensors"))
    if any(fnmatch(name, "model*.safetensors") for name in loose):
        raise SourceError(f"{where}: {INDEX_NAME} is required beside shards (got {', '.join(loose[:3])} without it)")
    pickles = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in _PICKLES))
    if pickles and not loose:
        raise SourceError(
            f"{where}: safetensors weights are required (got pickle: {pickles[0]}, which can run code when read); "
            f"convert with transformers: AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(FOLDER)"
        )
    if not config_only:
        found = f"got {', '.join(loose[:3])}" if loose else "got no weights"
        raise SourceError(f"{where}: {SINGLE_NAME} or {INDEX_NAME} is required ({found}); give a folder with weights")


STORED_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Torch name of each dtype that weights may have, by its safetensors name."""
DEQUANTISED = "bfloat16"
"""Dtype that the numbers of quantised tensors are stored in by default, after they were dequantised in float32."""
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def stored_dtype(where: str, headers: CheckpointHeaders, names: Collection[str] | None = None) -> str:
    """Returns the torch name of the dtype that most stored numbers have.

    Args:
        where: The checkpoint's name in messages.
        headers: Headers of its tensors.
        names: Tensors that count; None: all.

    Raises:
        SourceError: A tensor that counts has no plain float dtype.
    """
    sizes: Counter[str] = Counter()
    for name, info in headers.tensors.items():
        if names is None or name in names:
            if info.dtype not in STORED_DTYPES and info.dtype not in QUANTISED:
                raise SourceError(
                    f"{where}: {name}: dtype must be one of {', '.join(STORED_DTYPES)} (got {info.dtype}); "
                    f"dequantise it first, or take the original"
                )
            sizes[STORED_DTYPES.get(info.dtype, DEQUANTISED)] += info.num_elements
    return sizes.most_common(1)[0][0] if sizes else "bfloat16"


def describe_quantised(headers: CheckpointHeaders, dtype: str) -> str | None:
    """Describes the types of a checkpoint with quantised tensors; None if it has none.

    Args:
        headers: Headers of its tensors.
        dtype: Torch name of the dtype that the dequantised numbers are stored in.
    """
    if not any(info.dtype in QUANTISED for info in headers.tensors.values()):
        return None
    counts = Counter(info.dtype for info in headers.tensors.values())
    types = ", ".join(
        f"{count} {'tensors' if index == 0 else ''} {name}".replace("  ", " ")
        for index, (name, count) in enumerate(counts.most_common())
    )
    plain = headers.num_parameters * DTYPE_BYTES[dtype]
    return (
        f"quantised source: {types}; {headers.num_bytes:,} bytes as stored, {plain:,} bytes dequantised to {dtype}, in "
        f"which the folded model is stored"
    )


def config_dtype(config: Mapping[str, Any]) -> str:
    """Returns the torch name of the dtype in a config, for a folder without weights.

    Raises:
        SourceError: The config names no dtype, or one that weights may not have.
    """
    given = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if given not in DTYPE_BYTES:
        raise SourceError(f"config.json: dtype: {must_be_one_of(given[:60], DTYPE_BYTES)}")
    return given
