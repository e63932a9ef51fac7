"""Writes a folder of token shards: beside its place at first, then moved there whole."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from refold.checkpoint.atomic_file import flush
from refold.checkpoint.lock import FolderLock
from refold.data.encoder import EncodedDocument
from refold.data.shards import INDEX_NAME, OFFSETS_NAME, ShardIndex, TokenShards, targets_name, tokens_name
from refold.errors import DataError

SHARD_TOKENS = 2**27
"""Tokens of one file: 256 MB of a vocabulary below 65,536."""


class ShardWriter:
    """A folder of shards being written; leaving the `with` body without an error puts it in its place.

    Only one may write a folder at a time (see `cached`). Documents go to disk as they come. What a killed process left
    is removed by the next writer.
    """

    def __init__(self, folder: Path, dtype: np.dtype, has_targets: bool, name: str) -> None:
        """Makes nothing yet.

        Args:
            folder: where the shards are to be; its parent is there.
            dtype: of the tokens.
            has_targets: whether documents say which tokens are to be predicted.
            name: of the source, for messages.
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
        """Appends a document; one without tokens is left out.

        Raises:
            DataError: the disk is full or cannot be written.
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
            # Closing writes what is buffered, which on a full disk fails again.
            try:
                self._files.popitem()[1].close()
            except OSError:
                continue
        shutil.rmtree(self._unfinished, ignore_errors=True)


def cached(folder: Path, make: Callable[[], None]) -> TokenShards:
    """Opens a folder of shards; where there is none, one process makes it and all others wait.

    Args:
        folder: where the shards are, or are to be.
        make: writes them, with a `ShardWriter` of that folder.

    Raises:
        DataError: the folder is torn, or as `make` does.
        FolderError: the lock beside the folder cannot be made.
    """
    if not folder.exists():
        make_folder(folder.parent)
        with FolderLock(folder, wait=float("inf")):
            if not folder.exists():
                make()
    return TokenShards(folder)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it.

    Raises:
        DataError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(path: Path, error: OSError) -> DataError:
    """Words an error of writing to the cache."""
    reason = error.strerror or str(error)
    return DataError(f"{path}: the token cache must be writable ({reason}); free space or name another folder")


def _flush_and_close(file: BinaryIO) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())
