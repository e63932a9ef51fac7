"""Single files that are there whole or not at all, and what brings files and folders to the disk."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refold.errors import FolderError

_UNFINISHED = re.compile(r"\..+\.\d+\.unfinished")


def write_json(path: Path, value: Any) -> None:
    """Writes plain data as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text, stored as UTF-8, as `write_file` does."""
    write_file(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file so that a kill or power cut at any moment leaves the old one or the new one, never a part.

    Args:
        path: the file. Missing parents are made.
        write: writes all of it to the path it is given, which is then flushed and renamed.

    Raises:
        FolderError: the file cannot be written; the old one stands.
    """
    # Of this process: two that write the same file do not share a half-written one.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(unfinished)
            flush(unfinished)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        flush(path.parent)
    except OSError as error:
        raise FolderError(
            f"{path}: a writable place is required ({error.strerror or error}); choose another, or make room there"
        ) from error


def is_unfinished(path: Path) -> bool:
    """Says whether a file is what `write_file` had begun when its process was killed."""
    return _UNFINISHED.fullmatch(path.name) is not None


def flush(path: Path) -> None:
    """Brings a file's bytes, or a folder's entries, to the disk.

    Raises:
        OSError: the disk is full or failed.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
