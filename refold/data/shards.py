"""Token shards on disk: format, reader, writer and cache."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from refold.checkpoint.atomic_file import flush
from refold.checkpoint.lock import FolderLock
from refold.data.encoder import EncodedDocument
from refold.data.packing import PackedSequences
from refold.data.tokens import require_known_tokens
from refold.errors import DataError

INDEX_NAME = "index.json"
OFFSETS_NAME = "offsets.bin"
FORMAT = "refold-shards-1"


@dataclass(frozen=True)
class ShardIndex:
    """Contents of a folder of shards.

    Attributes:
        dtype: Dtype of the tokens, `uint16` or `uint32`, little-endian.
        shards: Number of tokens of every shard.
        num_documents: Number of documents, a cut last one included.
        num_bytes: UTF-8 bytes of the documents.
        largest_token: Largest token id.
        has_targets: Whether a second file of each shard has one byte per token that says whether it is a target.
        is_whole_source: Whether these are all tokens of the source, not only the first ones.
        sha256: Hash of tokens, targets and offsets.
        name: Name of the source, for messages.
        format: `FORMAT`.
    """

    dtype: str
    shards: tuple[int, ...]
    num_documents: int
    num_bytes: int
    largest_token: int
    has_targets: bool
    is_whole_source: bool
    sha256: str
    name: str
    format: str = FORMAT

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all shards."""
        return sum(self.shards)

    def files(self) -> dict[str, int]:
        """Returns the size of every file of the folder except the index."""
        width = np.dtype(self.dtype).itemsize
        sizes = {OFFSETS_NAME: 8 * (self.num_documents + 1)}
        for number, count in enumerate(self.shards):
            sizes[tokens_name(number)] = width * count
            if self.has_targets:
                sizes[targets_name(number)] = count
        return sizes

    def to_json(self) -> str:
        """Returns the text of the index file."""
        return json.dumps(asdict(self), indent=1) + "\n"


class ShardedArray:
    """A concatenation of one-dimensional memory-mapped files."""

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int], dtype: str) -> None:
        self._parts = [
            np.memmap(path, dtype=np.dtype(dtype), mode="r", shape=(size,))
            for path, size in zip(paths, sizes, strict=True)
        ]
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, key: slice) -> np.ndarray:
        start, stop, step = key.indices(len(self))
        assert step == 1
        pieces = []
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self._starts[number + 1]))
            first = int(self._starts[number])
            pieces.append(self._parts[number][start - first : end - first])
            start, number = end, number + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, dtype=self._parts[0].dtype), *pieces])


class TokenShards:
    """An open folder of shards.

    Attributes:
        index: The index.
        tokens: All tokens.
        is_target: Bool, the tokens to predict; None: all.
        offsets: Int64 `[num_documents + 1]`, the start of each document.
    """

    def __init__(self, folder: Path) -> None:
        """Opens a folder.

        Raises:
            DataError: A file is missing, its size differs from the index, or the index is damaged.
        """
        self.index = _read_index(folder)
        try:
            for name, size in self.index.files().items():
                found = (folder / name).stat().st_size
                if found != size:
                    raise _torn(folder, f"{name} has {found} bytes, not {size}")
            numbers = range(len(self.index.shards))
            self.tokens = ShardedArray(
                [folder / tokens_name(number) for number in numbers], self.index.shards, f"<{_code(self.index.dtype)}"
            )
            self.is_target = None
            if self.index.has_targets:
                self.is_target = ShardedArray(
                    [folder / targets_name(number) for number in numbers], self.index.shards, "bool"
                )
            self.offsets = np.memmap(folder / OFFSETS_NAME, dtype="<i8", mode="r")
        except OSError as error:
            raise _torn(folder, f"{Path(error.filename or folder).name}: {error.strerror or error}") from error
        if (self.offsets[0], self.offsets[-1]) != (0, self.index.num_tokens):
            raise _torn(folder, f"{OFFSETS_NAME} does not fit the tokens")

    def packed(self, context: int, seed: int) -> PackedSequences:
        """Returns the tokens as training sequences."""
        return PackedSequences(self.tokens, self.offsets, context, seed, self.is_target)

    def require_vocabulary(self, vocab_size: int | None) -> None:
        """Checks that all tokens are in a model's vocabulary.

        Raises:
            DataError: A token is not below the size of the vocabulary.
        """
        require_known_tokens(self.index.name, [self.index.largest_token], vocab_size)


def tokens_name(number: int) -> str:
    """Returns the file name of a shard's tokens."""
    return f"tokens-{number:05}.bin"


def targets_name(number: int) -> str:
    """Returns the file name of a shard's target mask."""
    return f"targets-{number:05}.bin"


def _read_index(folder: Path) -> ShardIndex:
    try:
        fields: Any = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        index = ShardIndex(**{**fields, "shards": tuple(fields["shards"])})
    except OSError as error:
        raise _torn(folder, f"{INDEX_NAME}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise _torn(folder, f"{INDEX_NAME} is not an index") from error
    if index.format != FORMAT or index.dtype not in ("uint16", "uint32") or not index.shards:
        raise _torn(folder, f"{INDEX_NAME} is not an index of format {FORMAT}")
    return index


def _code(dtype: str) -> str:
    return np.dtype(dtype).str[1:]


def _torn(folder: Path, reason: str) -> DataError:
    return DataError(f"{folder}: a whole token cache is required ({reason}); delete it to make it anew")


SHARD_TOKENS = 2**27
"""Tokens of one file: 256 MB for a vocabulary below 65,536."""


class ShardWriter:
    """Writes a folder of shards, which gets its final name when the `with` body ends without an error.

    Only one writer of a folder may run at a time (see `cached`). Documents are written to disk immediately. A writer
    removes the unfinished folder of a killed one.
    """

    def __init__(self, folder: Path, dtype: np.dtype, has_targets: bool, name: str) -> None:
        """Keeps the arguments; the folder is made on entering the `with` body.

        Args:
            folder: Final place of the shards; its parent must exist.
            dtype: Dtype of the tokens.
            has_targets: Whether documents have a target mask.
            name: Name of the source, for messages.
        """
        self.folder = folder
        self.num_tokens = 0
        self.is_whole_source = False
        self._unfinished = folder.parent / f".{folder.name}.unfinished"
        self._dtype = dtype
        self._has_targets = has_targets
        self._name = name
        self._shards: list[int] = []
        self._num_documents = 0
        self._num_bytes = 0
        self._largest = 0
        self._digests = {kind: hashlib.sha256() for kind in ("tokens", "targets", "offsets")}
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> "ShardWriter":
        try:
            shutil.rmtree(self._unfinished, ignore_errors=True)
            self._unfinished.mkdir(parents=True)
            self._open("offsets", OFFSETS_NAME)
            self._write("offsets", np.zeros(1, dtype="<i8"))
        except OSError as error:
            self._abandon()
            raise unwritable(self.folder, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and not self.num_tokens:
            error = DataError(f"data: at least one document that is not empty is required (got none in {self._name})")
        if error is not None:
            self._abandon()
            if kind is None:
                raise error
            return
        try:
            self._finish()
        except OSError as problem:
            self._abandon()
            raise unwritable(self.folder, problem) from problem

    def add(self, document: EncodedDocument) -> None:
        """Appends a document and drops one without tokens.

        Raises:
            DataError: The disk is full or not writable.
        """
        if not len(document.ids):
            return
        assert (document.is_target is not None) == self._has_targets
        try:
            start = 0
            while start < len(document.ids):
                if not self._shards or self._shards[-1] == SHARD_TOKENS:
                    self._next_shard()
                stop = min(len(document.ids), start + SHARD_TOKENS - self._shards[-1])
                self._write("tokens", document.ids[start:stop].astype(self._dtype.newbyteorder("<")))
                if document.is_target is not None:
                    self._write("targets", document.is_target[start:stop].astype(bool))
                self._shards[-1] += stop - start
                start = stop
            self.num_tokens += len(document.ids)
            self._num_documents += 1
            self._num_bytes += document.num_bytes
            self._largest = max(self._largest, int(document.ids.max()))
            self._write("offsets", np.array([self.num_tokens], dtype="<i8"))
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def _next_shard(self) -> None:
        number = len(self._shards)
        self._open("tokens", tokens_name(number))
        if self._has_targets:
            self._open("targets", targets_name(number))
        self._shards.append(0)

    def _open(self, kind: str, name: str) -> None:
        if kind in self._files:
            _flush_and_close(self._files.pop(kind))
        self._files[kind] = (self._unfinished / name).open("wb", buffering=2**20)

    def _write(self, kind: str, array: np.ndarray) -> None:
        raw = array.tobytes()
        self._digests[kind].update(raw)
        self._files[kind].write(raw)

    def _finish(self) -> None:
        while self._files:
            _flush_and_close(self._files.popitem()[1])
        index = ShardIndex(
            dtype=self._dtype.name,
            shards=tuple(self._shards),
            num_documents=self._num_documents,
            num_bytes=self._num_bytes,
            largest_token=self._largest,
            has_targets=self._has_targets,
            is_whole_source=self.is_whole_source,
            sha256=hashlib.sha256(b"".join(each.digest() for each in self._digests.values())).hexdigest(),
            name=self._name,
        )
        with (self._unfinished / INDEX_NAME).open("wb") as file:
            file.write(index.to_json().encode())
            file.flush()
            os.fsync(file.fileno())
        flush(self._unfinished)
        self._unfinished.rename(self.folder)
        flush(self.folder.parent)

    def _abandon(self) -> None:
        while self._files:
            # Closing writes the buffer, which fails again on a full disk.
            try:
                self._files.popitem()[1].close()
            except OSError:
                continue
        shutil.rmtree(self._unfinished, ignore_errors=True)


def cached(folder: Path, make: Callable[[], None]) -> TokenShards:
    """Opens a folder of shards; if it does not exist, one process makes it while all others wait.

    Args:
        folder: The folder of the shards.
        make: Writes the shards with a `ShardWriter` of the folder.

    Raises:
        DataError: The folder is incomplete, or `make` raises it.
        FolderError: The lock beside the folder cannot be made.
    """
    if not folder.exists():
        make_folder(folder.parent)
        with FolderLock(folder, wait=float("inf")):
            if not folder.exists():
                make()
    return TokenShards(folder)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents.

    Raises:
        DataError: The folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(path: Path, error: OSError) -> DataError:
    """Returns the error for a cache that cannot be written."""
    reason = error.strerror or str(error)
    return DataError(f"{path}: the token cache must be writable ({reason}); free space or name another folder")


def _flush_and_close(file: BinaryIO) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())
