"""Files of an untrusted model folder: only plain files are opened, and only JSON objects are accepted."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from refold.errors import SourceError


def open_file(path: Path) -> BinaryIO:
    """Opens a plain file for reading; links are followed.

    Raises:
        SourceError: The file cannot be read, or is a folder, a pipe, a socket or a device, which could block for ever.
    """
    try:
        # Without O_NONBLOCK opening a pipe waits for a writer.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); check the file") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SourceError(f"{path}: cannot be read (not a plain file); put the file's content there")
    return os.fdopen(fd, "rb")


def read_file(path: Path) -> bytes:
    """Returns the bytes of a plain file.

    Raises:
        SourceError: As `open_file`.
    """
    with open_file(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({error.strerror}); check the file") from None


def read_range(path: Path, start: int, size: int) -> bytes:
    """Returns `size` bytes of a plain file from position `start`.

    Raises:
        SourceError: As `open_file`.
    """
    with open_file(path) as file:
        file.seek(start)
        return file.read(size)


def parse_object(
    raw: bytes, where: str, mend: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        raw: The text, in UTF-8.
        where: The file's name in messages.
        mend: Remedy at the end of messages.
        pairs: Makes an object of its pairs; None: the last of several equal keys counts.

    Raises:
        SourceError: The text is not JSON, is nested too deeply, or is another value than an object.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition("\n")[0][:80]
        raise SourceError(f"{where}: JSON is required ({reason}); {mend}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{where}: a JSON object is required (got {type(value).__name__}); {mend}")
    return value
