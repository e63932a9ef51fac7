import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from refold.checkpoint.writer import RunningHash


def test_the_hash_follows_the_front_of_the_file(tmp_path: Path) -> None:
    content = os.urandom(5 << 20)
    path = tmp_path / "file"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    with ThreadPoolExecutor(2) as pool:
        running = RunningHash(fd, pool)
        for end in (0, 1, 1, 70_000, 3 << 20, len(content)):
            running.advance(end)
        assert running.result() == hashlib.sha256(content).hexdigest()
        # Only what was announced is read.
        half = RunningHash(fd, pool)
        half.advance(100)
        assert half.result() == hashlib.sha256(content[:100]).hexdigest()
        assert RunningHash(fd, pool).result() == hashlib.sha256().hexdigest()
    os.close(fd)


def test_a_file_shorter_than_announced_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with ThreadPoolExecutor(1) as pool:
        running = RunningHash(fd, pool)
        running.advance(10)
        with pytest.raises(OSError, match="file shrank below 10 bytes"):
            running.result()
    os.close(fd)
