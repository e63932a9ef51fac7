"""The data files of a folder, and the list of the files that are skipped."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from refold.data.blocks import BROKEN_PARQUET, check_column
from refold.data.field import Field, OtherContentError
from refold.data.kinds import (
    COMPRESSIONS,
    ROW_ENDINGS,
    TEXT_ENDINGS,
    FileKind,
    endings,
    recognise,
    require_file,
)
from refold.data.sequential import SequentialBlock
from refold.errors import DataError

COMPANIONS = ("readme", "license", "licence", "notice", "citation", "changelog", "contributing")
"""Beginnings of the names of text files that describe data; in a folder with rows they are no data themselves."""
_NAMED = 5


@dataclass(frozen=True)
class DataFolder:
    """The data files of one path.

    Attributes:
        path: The path as given.
        files: The files to read, in order.
        kinds: The number of these files for each kind.
        skipped: The other files of a folder, with the reason; hidden files are not listed.
    """

    path: Path
    files: tuple[Path, ...]
    kinds: dict[str, int]
    skipped: tuple[tuple[Path, str], ...]

    @property
    def says_more(self) -> bool:
        """Whether the line is worth printing: files are skipped, or there are several kinds."""
        return bool(self.skipped) or len(self.kinds) > 1

    @property
    def line(self) -> str:
        """Lists the files that are read and the files that are skipped."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        text = f"{self.path}: {len(self.files)} files are read ({kinds})"
        if not self.skipped:
            return text
        shown = [f"{path.relative_to(self.path)} ({reason})" for path, reason in self.skipped[:_NAMED]]
        more = f" and {len(self.skipped) - _NAMED} more" if len(self.skipped) > _NAMED else ""
        return f"{text}, {len(self.skipped)} are skipped: {', '.join(shown)}{more}"


def walk(path: Path, field: Field) -> DataFolder:
    """Finds the data files of a path: the file itself, or the files of a folder with a known ending and the field.

    Args:
        path: A file or folder.
        field: The field of the documents.

    Raises:
        DataError: The path does not exist, or the folder has no data.
    """
    if not _is_folder(path):
        return DataFolder(path, (path,), {}, ())
    found: list[tuple[Path, FileKind]] = []
    skipped: list[tuple[Path, str]] = []
    first_mistake: OtherContentError | None = None
    for file in _visible(path):
        ending, _ = endings(file)
        if ending not in TEXT_ENDINGS + ROW_ENDINGS:
            skipped.append((file, "unknown ending"))
            continue
        try:
            require_file(file)
            if not file.stat().st_size:
                skipped.append((file, "empty"))
                continue
            kind = recognise(file, field)
            if kind.layout != "text":
                _peek(file, kind, field)
        except OtherContentError as error:
            reason = re.sub(rf"^{re.escape(str(file))}(:\d+)?: ", "", str(error)).partition("; ")[0]
            skipped.append((file, reason))
            first_mistake = first_mistake or error
        else:
            found.append((file, kind))
    if any(kind.layout != "text" for _, kind in found):
        described = [each for each in found if each[1].layout == "text" and each[0].name.lower().startswith(COMPANIONS)]
        found = [each for each in found if each not in described]
        skipped += [(file, "describes the data") for file, _ in described]
    if not found:
        if first_mistake is not None:
            raise first_mistake
        known = ", ".join(TEXT_ENDINGS + ROW_ENDINGS)
        raise DataError(
            f"{path}: files ending in {known} are required, or these with {' or '.join(COMPRESSIONS)} (got none)"
        )
    kinds = Counter(str(kind) for _, kind in found)
    return DataFolder(path, tuple(file for file, _ in found), dict(kinds), tuple(skipped))


def _is_folder(path: Path) -> bool:
    try:
        if path.is_dir():
            return True
        if not path.exists():
            raise DataError(f"{path}: an existing file or folder is required (got nothing there)")
    except (OSError, ValueError) as error:
        shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:200]}..."
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{shown!r}: the path of a file or folder is required ({reason})") from None
    return False


def _visible(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _peek(file: Path, kind: FileKind, field: Field) -> None:
    """Checks the first row, because a file whose rows have no documents is skipped."""
    if kind.layout == "parquet" and not kind.compression:
        import pyarrow.parquet as pq

        try:
            schema = pq.read_schema(file)
        except BROKEN_PARQUET:
            return  # A damaged file is not skipped: reading it raises the error.
        check_column(schema, field, file)
        return
    SequentialBlock(file, kind, field, 2**20, 1).peek()
