"""A sha256 that is computed while the file is being written."""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

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
