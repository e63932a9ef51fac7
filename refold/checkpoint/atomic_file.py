"""Atomic writing of single files, and flushing of files and folders to disk."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refold.errors import FolderError

# A line ends only between entries: a string has its line ends escaped.
_FLAT_LIST, _INDENT = re.compile(r"\[\n *([^\[\]{}]*?)\n *\]"), re.compile(r"\n *")
_UNFINISHED = re.compile(r"\..+\.\d+\.unfinished")


def json_text(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Returns plain data as indented JSON, with each list of numbers or words on one line.

    Args:
        value: The data.
        default: Makes plain data of a value that is none, as for `json.dumps`.
    """
    text = json.dumps(value, indent=2, default=default)
    return _FLAT_LIST.sub(lambda found: "[" + _INDENT.sub(" ", found[1]) + "]", text)


def write_json(path: Path, value: Any) -> None:
    """Writes plain data as JSON, as `write_text` does."""
    write_text(path, json_text(value) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text, stored as UTF-8, as `write_file` does."""
    write_file(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file so that a kill or power cut leaves the old or the new file, never a part of it.

    Args:
        path: The file. Missing parents are made.
        write: Writes the whole content to the path that is its argument; this file is then flushed and renamed.

    Raises:
        FolderError: The file cannot be written; the old file remains.
    """
    # The name has the process id, so that two processes never write the same unfinished file.
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


def require_writable(folder: Path) -> None:
    """Checks, before any work, that a file can be made in a folder, which need not exist yet.

    Raises:
        FolderError: It, or the nearest folder above it that exists, is a file or read-only.
    """
    nearest = next(each for each in (folder, *folder.parents) if each.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        got = "read-only" if nearest.is_dir() else "a file"
        raise FolderError(f"{folder}: a writable place is required ({nearest} is {got}); choose another")


def require_free(path: str | Path, kind: str, is_kind: Callable[[Path], bool], overwrite: bool = False) -> Path:
    """Checks that a file can be written without replacing a file of another kind.

    Args:
        path: The file.
        kind: Name of such files in messages, such as `state file`.
        is_kind: Tells whether an existing regular file is of this kind.
        overwrite: An older file of this kind may be replaced.

    Returns:
        The path.

    Raises:
        FolderError: The place is not writable; or the path is a folder, a link, a device or a file of another kind; or
            it exists and `overwrite` is False.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise FolderError(f"{path}: a file name is required (got a folder); name a file in it")
        if not os.path.lexists(path):
            require_writable(path.absolute().parent)
            return path
        if not overwrite:
            raise FolderError(f"{path}: a new file is required (it exists); choose another or pass --overwrite")
        if path.is_symlink() or not path.is_file() or not is_kind(path):
            raise FolderError(f"{path}: a {kind} is required to be overwritten (got another file); choose another name")
    except OSError as error:
        raise FolderError(f"{path}: a writable place is required ({error.strerror}); choose another") from error
    return path


def is_unfinished(path: Path) -> bool:
    """Tells whether a file is an unfinished file of `write_file` whose process was killed."""
    return _UNFINISHED.fullmatch(path.name) is not None


def flush(path: Path) -> None:
    """Flushes a file's bytes, or a folder's entries, to disk.

    Raises:
        OSError: The disk is full or failed.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
