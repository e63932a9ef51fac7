"""`manifest.json`: size and sha256 of every file of a folder; it is written last and marks a complete folder."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from refold.checkpoint.source_file import read_file
from refold.errors import FolderError, SourceError
from refold.version import __version__

MANIFEST_NAME = "manifest.json"
EXITS_NAME = "exits.json"
"""Thresholds of early exits, written into a finished folder by `refold calibrate`."""
FORMAT = 1
# The model card may be edited: `verify` names a changed card, and loading accepts it.
_EDITABLE = {"README.md"}
# Files that are written after the folder is finished. They have checksums of their own and name the weights that they
# belong to, so the manifest never lists them.
_LATER = {MANIFEST_NAME, EXITS_NAME}
# A folder whose manifest does not list these cannot be verified.
_REQUIRED = (".safetensors", ".safetensors.index.json", "config.json", "state.json")
_BLOCK_BYTES = 1 << 20


def write_manifest(folder: Path, known_hashes: Mapping[str, str] | None = None) -> None:
    """Writes the manifest of a finished folder and flushes it to disk.

    Args:
        folder: The folder; all files in it, at any depth, are listed, except the manifest and `exits.json`.
        known_hashes: sha256 by file name; other files are read and hashed.
    """
    known_hashes = known_hashes or {}
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": known_hashes.get(name) or hash_file(folder / name)}
        for name in _list_files(folder)
    }
    unknown = sorted(set(known_hashes) - set(files))
    if unknown:
        raise FolderError(f"{folder}: a file is required for each known hash (missing: {', '.join(unknown)})")
    with (folder / MANIFEST_NAME).open("w") as file:
        json.dump({"format": FORMAT, "refold": __version__, "files": files}, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def is_refold_folder(folder: Path) -> bool:
    """Tells whether a folder was written by refold, from its manifest; it may be damaged."""
    try:
        manifest = json.loads(read_file(folder / MANIFEST_NAME))
    except (SourceError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and "refold" in manifest and isinstance(manifest.get("files"), dict)


def check(folder: Path) -> None:
    """Checks quickly that a folder is complete: the manifest exists, and every listed file with its size.

    Raises:
        FolderError: There is no manifest, or a file is missing or has another size; the message names each file.
    """
    found = _compare_sizes(folder)
    faults = [f"{name} ({fault})" for name, fault in found if name not in _EDITABLE]
    if faults:
        raise FolderError(
            f"{folder}: the files of {MANIFEST_NAME} are required whole (got {', '.join(faults)}); "
            f"copy the folder again or make it anew"
        )


def listed_files(folder: Path) -> list[str]:
    """Returns the names of the files of a folder of refold: those of its manifest, the manifest and `exits.json`.

    Raises:
        FolderError: The manifest is missing or damaged.
    """
    return sorted([*_read_files(folder), *(name for name in _LATER if (folder / name).is_file())])


def verify(folder: Path, progress: Callable[[int], None] | None = None, allow_edited: bool = False) -> tuple[str, ...]:
    """Checks every file's bytes against the manifest.

    Args:
        folder: A folder written by refold.
        progress: Called with the number of bytes hashed since the last call.
        allow_edited: Whether the model card may differ.

    Returns:
        Harmless files that the manifest does not list.

    Raises:
        FolderError: A file is missing or has another size or content, or weights or config are not listed; the message
            names each file.
    """
    files = _read_files(folder)
    faults = dict(_compare_sizes(folder))
    extra = [name for name in _list_files(folder) if name not in files]
    faults |= {name: "not listed" for name in extra if name.endswith(_REQUIRED)}
    for name, entry in files.items():
        if name not in faults and hash_file(folder / name, progress) != entry["sha256"]:
            faults[name] = "content differs from its sha256"
    for name in _EDITABLE if allow_edited else ():
        faults.pop(name, None)
    if faults:
        listed = ", ".join(f"{name} ({fault})" for name, fault in faults.items())
        raise FolderError(
            f"{folder}: the files of {MANIFEST_NAME} are required unchanged (got {listed}); "
            f"copy the folder again or make it anew"
        )
    return tuple(extra)


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Returns a file's sha256 as hex digits."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                if progress is not None:
                    progress(count)
    except OSError as error:
        raise FolderError(f"{path}: cannot be read ({error.strerror}); check the file") from None
    return digest.hexdigest()


def content_hash(path: Path) -> str:
    """Returns a file's sha256 as hex digits: from its folder's manifest, or read from the file.

    Hashes of the manifest are used under the conditions of `listed_hashes`; other files are hashed.

    Raises:
        FolderError: The file cannot be read, or the folder's manifest is damaged.
    """
    known = listed_hashes(path.parent, [path.name])
    return hash_file(path) if known is None else known[0]


def listed_hashes(folder: Path, names: Sequence[str]) -> list[str] | None:
    """Returns the sha256 of files from the folder's manifest; None if a file may have changed since.

    A file counts as unchanged if it has the listed size and is not newer than the manifest.

    Raises:
        FolderError: The folder's manifest is damaged.
    """
    if not is_refold_folder(folder):
        return None
    listed, hashes = _read_files(folder), []
    for name in names:
        entry = listed.get(name)
        try:
            found, manifest = (folder / name).stat(), (folder / MANIFEST_NAME).stat()
        except OSError:
            return None
        if entry is None or found.st_size != entry["bytes"] or found.st_mtime_ns > manifest.st_mtime_ns:
            return None
        hashes.append(entry["sha256"])
    return hashes


def _list_files(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in _LATER)


def _compare_sizes(folder: Path) -> Iterator[tuple[str, str]]:
    for name, entry in _read_files(folder).items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            yield name, "missing"
            continue
        if size != entry["bytes"]:
            yield name, f"{size} bytes instead of {entry['bytes']}"


def _read_files(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FolderError(
            f"{folder}: {MANIFEST_NAME} is required (missing: not a refold folder, or a torn one); "
            f"give one that refold wrote"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{path}: readable JSON is required ({str(error)[:80]}); copy the folder again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise FolderError(f"{path}: manifest format {FORMAT} is required (got {got}); use the refold that wrote it")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise FolderError(f"{path}: `files` with bytes and sha256 of each is required; copy the folder again")
    return files


def _is_entry(name: str, entry: Any) -> bool:
    inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    if not inside or not isinstance(entry, dict):
        return False
    return isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
