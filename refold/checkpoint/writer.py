"""A sha256 that is computed while the file is being written."""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from types import TracebackType

import torch

from refold.checkpoint.finite import require_finite
from refold.checkpoint.headers import INDEX_NAME, SINGLE_NAME
from refold.checkpoint.tensor_file import lay_out, tensor_bytes, write_all
from refold.errors import FolderError

_BLOCK_BYTES = 1 << 20


class RunningHash:
    """Hashes the finished front of a file in the background, from the page cache.

    Reading back takes a few per cent of the time of hashing, holds one block in memory, and works for any order of
    writes.

    Args:
        fd: The file, open for reading; it must stay open until `result` has returned.
        pool: Threads that hash; one task at a time for each file.
    """

    def __init__(self, fd: int, pool: ThreadPoolExecutor):
        self._fd = fd
        self._pool = pool
        self._digest = hashlib.sha256()
        self._position = 0
        self._end = 0
        self._lock = Lock()
        self._task: Future[None] | None = None
        self._is_running = False

    def advance(self, end: int) -> None:
        """Marks the bytes before `end` as final."""
        with self._lock:
            self._end = end
            if not self._is_running and self._position < end:
                self._is_running = True
                self._task = self._pool.submit(self._run)

    def result(self) -> str:
        """Waits until all final bytes are hashed, and returns the hash as hex digits."""
        if self._task is not None:
            self._task.result()
        return self._digest.hexdigest()

    def stop(self) -> None:
        """Stops hashing; the hash is then invalid."""
        with self._lock:
            self._end = 0

    def _run(self) -> None:
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        while True:
            with self._lock:
                left = self._end - self._position
                if left <= 0:
                    self._is_running = False
                    return
            # A read into a fixed buffer; hashlib releases the GIL while it hashes a block.
            count = os.preadv(self._fd, [buffer[: min(left, _BLOCK_BYTES)]], self._position)
            if count == 0:
                raise OSError(f"file shrank below {self._end} bytes while it was written")
            self._digest.update(buffer[:count])
            self._position += count


GIB = 1 << 30
TensorSpecs = Mapping[str, tuple[Sequence[int], torch.dtype]]


def count_bytes(tensors: TensorSpecs) -> int:
    """Returns the bytes of data of tensors given as name -> (shape, dtype)."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())


class ShardedWriter:
    """Writes tensors whose names, shapes and dtypes are planned, in any order, without copies.

    Shards are filled in the planned order (within a shard wider dtypes first, so that each tensor is aligned). They are
    preallocated, so a full disk is noticed before any work is done. Files are hashed and flushed to disk in the
    background while they are written.

    Args:
        folder: An existing folder, usually the `path` of an `AtomicFolder`.
        tensors: name -> (shape, dtype) of all tensors.
        max_shard_bytes: Data bytes per file; a larger tensor has its own file.
        metadata: The header's `__metadata__`.
        is_finite: Whether every number must be finite; the state of an optimiser need not be.

    Attributes:
        hashes: After `close`, sha256 by file name, for `AtomicFolder.hashes`.
        num_bytes: Bytes of all files.

    Raises:
        FolderError: The disk is too small, or the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        tensors: TensorSpecs,
        max_shard_bytes: int = 4 * GIB,
        metadata: Mapping[str, str] | None = None,
        is_finite: bool = True,
    ):
        self.folder = folder
        self._is_finite = is_finite
        self.hashes: dict[str, str] = {}
        self._specs = {name: (tuple(shape), dtype) for name, (shape, dtype) in tensors.items()}
        # Two threads hash and one flushes: hashing waits for a core, flushing for the disk.
        self._pool = ThreadPoolExecutor(3, thread_name_prefix="refold-writer")
        groups = _plan_shards(self._specs, max_shard_bytes)
        names = [SINGLE_NAME] if len(groups) == 1 else _shard_names(len(groups))
        header = {"__metadata__": dict(metadata or {"format": "pt"})}
        self._shards: list[_Shard] = []
        try:
            for name, group in zip(names, groups, strict=True):
                self._shards.append(_Shard(folder / name, {key: self._specs[key] for key in group}, header, self._pool))
            self.num_bytes = sum(shard.num_bytes for shard in self._shards)
            self._preallocate()
        except BaseException:
            self.abort()
            raise
        self._shard_of = {name: shard for shard in self._shards for name in shard.places}

    def __enter__(self) -> "ShardedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor.

        Args:
            name: A planned name that is not written yet.
            tensor: A tensor of the planned shape and dtype; it is copied if it is not contiguous on the CPU.

        Raises:
            FolderError: The tensor does not fit the plan, is written already, or holds a number that is not finite; or
                the disk is full.
        """
        if name not in self._specs:
            raise FolderError(f"{self.folder}: tensor {name} has no place (not planned)")
        shape, dtype = self._specs[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise FolderError(
                f"{self.folder}: tensor {name} is required as {dtype} {list(shape)} "
                f"(got {tensor.dtype} {list(tensor.shape)})"
            )
        shard = self._shard_of[name]
        if name in shard.written:
            raise FolderError(f"{self.folder}: tensor {name} is required once (written before)")
        if self._is_finite:
            # The message names the destination, not its hidden sibling.
            require_finite(
                tensor, name, "output", FolderError, "the model's numbers have overflowed or were never finite"
            )
        try:
            shard.write(name, tensor)
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Finishes all files, and writes the index if there are several.

        Raises:
            FolderError: Tensors were never written, each named, or the disk failed.
        """
        missing = [name for shard in self._shards for name in shard.places if name not in shard.written]
        if missing:
            self.abort()
            raise FolderError(f"{self.folder}: {len(missing)} tensors were never written: {_listed(missing)}")
        try:
            self.hashes = {shard.path.name: shard.finish() for shard in self._shards}
            if len(self._shards) > 1:
                self._write_index()
        except OSError as error:
            raise self._failed(error) from None
        finally:
            self.abort()

    def abort(self) -> None:
        """Closes all files without finishing them."""
        for shard in self._shards:
            shard.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for shard in self._shards:
            shard.close()

    def _preallocate(self) -> None:
        try:
            for shard in self._shards:
                shard.allocate()
        except OSError as error:
            raise self._failed(error) from None

    def _write_index(self) -> None:
        index = {
            "metadata": {
                "total_size": count_bytes(self._specs),
                "total_parameters": sum(math.prod(shape) for shape, _ in self._specs.values()),
            },
            "weight_map": {name: self._shard_of[name].path.name for name in self._specs},
        }
        (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def _failed(self, error: OSError) -> FolderError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            for shard in self._shards:
                shard.stop()
            self._pool.shutdown(wait=True, cancel_futures=True)
            for shard in self._shards:
                shard.close(remove=True)
            free = shutil.disk_usage(self.folder).free
            return FolderError(
                f"{self.folder}: disk full: {self.num_bytes} bytes are required (free: {free}; {error.strerror}); "
                f"make room or choose another output"
            )
        return FolderError(f"{self.folder}: a writable folder is required ({error.strerror}); check path and rights")


class _Shard:
    """One file: its header, its tensors' offsets, and the length of its final front."""

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        header: Mapping[str, object],
        pool: ThreadPoolExecutor,
    ):
        self.path = path
        self.fd = -1
        self.written: set[str] = set()
        self._head, self.places = lay_out(specs, header)
        self.num_bytes = max((end for _, end in self.places.values()), default=len(self._head))
        self._order = list(self.places)
        self._num_final = 0
        self._pool = pool
        self._hash: RunningHash | None = None
        self._flushed: Future[None] | None = None

    def allocate(self) -> None:
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.fd, 0, self.num_bytes)
        else:
            os.ftruncate(self.fd, self.num_bytes)
        self._hash = RunningHash(self.fd, self._pool)
        write_all(self.fd, memoryview(self._head), 0)
        self._advance()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        write_all(self.fd, tensor_bytes(tensor), self.places[name][0])
        self.written.add(name)
        self._advance()

    def finish(self) -> str:
        """Waits until the file is hashed and on disk, and returns its sha256."""
        assert self._hash is not None
        assert self._flushed is not None
        digest = self._hash.result()
        self._flushed.result()
        return digest

    def stop(self) -> None:
        if self._hash is not None:
            self._hash.stop()

    def close(self, remove: bool = False) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            if remove:
                self.path.unlink(missing_ok=True)

    def _advance(self) -> None:
        while self._num_final < len(self._order) and self._order[self._num_final] in self.written:
            self._num_final += 1
        assert self._hash is not None
        if self._num_final == len(self._order):
            self._hash.advance(self.num_bytes)
            self._flushed = self._pool.submit(os.fsync, self.fd)
        else:
            self._hash.advance(self.places[self._order[self._num_final]][0])


def _plan_shards(specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]], max_shard_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, (shape, dtype) in specs.items():
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names) - 5} more)" if len(names) > 5 else "")
