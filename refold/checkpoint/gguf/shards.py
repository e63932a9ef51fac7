"""GGUF models in several files, `NAME-00001-of-00003.gguf`, and the one GGUF model of a folder."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from refold.errors import SourceError

SUFFIX = ".gguf"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_MAX_NAMED = 5


def is_gguf(path: Path) -> bool:
    """Tells by the name whether a file is a GGUF file."""
    return path.suffix.lower() == SUFFIX


def find_gguf(folder: Path, names: Collection[str]) -> Path | None:
    """Returns the GGUF file, or the first of the files, of the only GGUF model in a folder; None without one.

    Args:
        folder: The folder.
        names: Names of its files.

    Raises:
        SourceError: There are several models.
    """
    files = sorted(name for name in names if is_gguf(Path(name)))
    models = {(match["stem"], match["count"]) if (match := _SHARD.fullmatch(name)) else name for name in files}
    if len(models) > 1:
        shown = ", ".join(files[:_MAX_NAMED]) + (", ..." if len(files) > _MAX_NAMED else "")
        raise SourceError(f"{folder}: one GGUF model is required (got {shown}); name the file")
    return folder / files[0] if files else None


def list_shards(path: Path) -> Sequence[Path]:
    """Returns all files of a model in order.

    Args:
        path: The only file of the model, or the first of several.

    Raises:
        SourceError: `path` is a later file, or a file is missing.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])

    def shard(number: int) -> Path:
        return path.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}{path.suffix}")

    if int(match["number"]) != 1:
        raise SourceError(
            f"{path}: the first of the files is required (got number {int(match['number'])}); give {shard(1)}"
        )
    files = [path, *(shard(number) for number in range(2, count + 1))]
    for file in files:
        if not file.exists():
            raise SourceError(f"{path}: shard {file.name} is required (missing); complete the download or the copy")
    return files
