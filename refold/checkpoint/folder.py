"""Atomic folders: written beside the destination, flushed and swapped in; a kill leaves the old or the new folder."""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import time
from pathlib import Path
from types import TracebackType

from refold.checkpoint.atomic_file import flush
from refold.checkpoint.lock import FolderLock, FolderLockedError
from refold.checkpoint.manifest import check, is_refold_folder, write_manifest
from refold.errors import FolderError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class AtomicFolder:
    """Writes a folder atomically.

    Inside the `with` body, write to `path`, a hidden sibling of the destination. When the body ends, files are flushed,
    the manifest is written and the folder takes the destination's place; when it raises, the sibling is removed.

    Args:
        destination: The folder to make. Missing parents are made.
        overwrite: Replace a folder that refold wrote; other folders are never replaced.
        needed_bytes: Disk space that must be free before anything is written.

    Attributes:
        path: The folder to write into.
        hashes: sha256 by file name; files in it are not hashed again for the manifest.

    Raises:
        FolderError: The destination exists, is locked or cannot be written, or the disk is full.
    """

    def __init__(self, destination: str | Path, overwrite: bool = False, needed_bytes: int = 0):
        self.destination = _real(destination)
        self.hashes: dict[str, str] = {}
        self._overwrite = overwrite
        self._needed_bytes = needed_bytes
        self._made_parents: list[Path] = []
        self._lock = FolderLock(self.destination)
        self.path = _hidden(self.destination, f"partial-{secrets.token_hex(8)}")

    def __enter__(self) -> "AtomicFolder":
        self._require_free()
        try:
            self._make_parents()
            self._lock.__enter__()
        except BaseException:
            self._remove_parents()
            raise
        try:
            _repair_locked(self.destination)
            self._require_free()
            self._require_space()
            self.path.mkdir()
        except BaseException as error:
            self._abandon()
            raise _as_folder_error(self.destination, error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._abandon()
            if isinstance(error, OSError) and error.errno in _FULL:
                raise _as_folder_error(self.destination, error) from None
            return
        try:
            _flush_files(self.path)
            write_manifest(self.path, self.hashes)
            _flush_folders(self.path)
            self._require_free()
            _swap_in(self.path, self.destination)
        except BaseException as failure:
            self._abandon()
            raise _as_folder_error(self.destination, failure) from None
        # From here on the new folder is in place; the rest of the old one is debris, by its name.
        try:
            with contextlib.suppress(OSError):
                _repair_locked(self.destination)
        finally:
            self._lock.__exit__()

    def _abandon(self) -> None:
        # After an interrupt just behind the swap, `path` holds the old folder, which is to be removed.
        with contextlib.suppress(OSError):
            _repair_locked(self.destination)
        self._lock.__exit__()
        self._remove_parents()

    def _require_free(self) -> None:
        where = self.destination
        if not where.exists():
            return
        if not where.is_dir():
            raise FolderError(f"{where}: a folder's place is required (got a file); choose another output")
        if not any(where.iterdir()):
            return
        if not is_refold_folder(where):
            raise FolderError(
                f"{where}: a new folder, or one written by refold, is required (it holds other files, which are never "
                f"overwritten); choose another output"
            )
        if not self._overwrite:
            raise FolderError(f"{where}: a new folder is required (it exists); choose another or pass --overwrite")

    def _require_space(self) -> None:
        free = shutil.disk_usage(self.destination.parent).free
        if free < self._needed_bytes:
            raise FolderError(
                f"{self.destination}: {self._needed_bytes} bytes of disk are required (free: {free}); "
                f"make room or choose another output"
            )

    def _make_parents(self) -> None:
        missing = []
        parent = self.destination.parent
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        try:
            for parent in reversed(missing):
                parent.mkdir(exist_ok=True)
                self._made_parents.append(parent)
        except OSError as error:
            raise _as_folder_error(self.destination, error) from None

    def _remove_parents(self) -> None:
        with contextlib.suppress(OSError):
            for parent in reversed(self._made_parents):
                parent.rmdir()


def repair(destination: str | Path) -> None:
    """Repairs a folder after a killed writer: restores the old folder if there is no new one, and removes debris.

    Every reader calls this first. It does nothing while a live writer holds the folder.

    Raises:
        FolderError: The old folder cannot be restored.
    """
    destination = _real(destination)
    if not _needs_repair(destination):
        return
    try:
        with FolderLock(destination, wait=0.0):
            _repair_locked(destination)
    except FolderLockedError:
        # Between the two renames of a live swap the destination is missing for a moment.
        deadline = time.monotonic() + 2.0
        while not destination.exists() and _hidden(destination, "old").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    except (FolderError, OSError) as error:
        # Reading is possible with debris that this user may not remove, but not without the folder.
        if not destination.exists() and _hidden(destination, "old").exists():
            raise _as_folder_error(destination, error) from None


def settle(folder: str | Path) -> Path:
    """Prepares a folder for reading: repairs it, and checks that a folder of refold is complete.

    Returns:
        The folder. It may be missing or no checkpoint.

    Raises:
        FolderError: A folder of refold is torn.
    """
    folder = Path(folder).expanduser()
    repair(folder)
    if is_refold_folder(folder):
        check(folder)
    return folder


def require_elsewhere(destination: str | Path, model: Path) -> None:
    """Checks that a destination is not the place of the model that is read.

    Args:
        destination: The folder or file to write.
        model: The folder or file of the model.

    Raises:
        FolderError: It is, so that the model would be lost.
    """
    place = model.resolve()
    if _real(destination) in ({place, place.parent} if place.is_file() else {place}):
        raise FolderError(f"{destination}: another place than the model's is required (it would replace the model)")


def _real(destination: str | Path) -> Path:
    return Path(os.path.realpath(Path(destination).expanduser()))


def _hidden(destination: Path, what: str) -> Path:
    return destination.parent / f".{destination.name}.{what}"


def _partials(destination: Path) -> list[Path]:
    # A full match: `.a.partial-x.old` belongs to a destination called `a.partial-x`, not to `a`.
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.partial-[0-9a-f]{{16}}")
    try:
        return [path for path in destination.parent.iterdir() if pattern.fullmatch(path.name)]
    except OSError:
        return []


def _needs_repair(destination: Path) -> bool:
    return is_refold_folder(_hidden(destination, "old")) or bool(_partials(destination))


def _repair_locked(destination: Path) -> None:
    """Repairs under the folder's lock. No writer lives, so every partial folder is debris."""
    old = _hidden(destination, "old")
    if is_refold_folder(old):
        if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
            os.rename(old, destination)
            flush(destination.parent)
        elif is_refold_folder(destination):
            _discard(old, destination)
    for partial in _partials(destination):
        shutil.rmtree(partial, ignore_errors=True)


def _discard(folder: Path, destination: Path) -> None:
    # Renamed before it is removed, so that a kill during the removal leaves debris, not half a valid folder.
    debris = _hidden(destination, f"partial-{secrets.token_hex(8)}")
    os.rename(folder, debris)
    shutil.rmtree(debris, ignore_errors=True)


def _swap_in(stage: Path, destination: Path) -> None:
    """Puts `stage` at `destination`; the old folder is then at `stage`, or discarded."""
    if not destination.exists() or not any(destination.iterdir()):
        os.rename(stage, destination)
        flush(destination.parent)
        return
    if _exchange(stage, destination):
        flush(destination.parent)
        return
    old = _hidden(destination, "old")
    if old.exists():
        raise FolderError(f"{old}: this name is required to be free while {destination} is replaced; move it away")
    os.rename(destination, old)
    os.rename(stage, destination)
    flush(destination.parent)
    _discard(old, destination)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step (Linux renameat2); returns False if kernel or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _flush_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            flush(path)


def _flush_folders(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            flush(path)


def _as_folder_error(where: Path, error: BaseException) -> BaseException:
    """Turns an operating system's error into a FolderError; other errors are returned unchanged."""
    if not isinstance(error, OSError):
        return error
    if error.errno in _FULL:
        # Parents that were made for the folder are gone again.
        existing = next(parent for parent in where.parents if parent.exists())
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(existing).free
            return FolderError(
                f"{where}: disk full ({error.strerror}; free: {free} bytes); make room or choose another"
            )
    return FolderError(f"{where}: a writable place is required ({error.strerror or error}); check path and rights")
