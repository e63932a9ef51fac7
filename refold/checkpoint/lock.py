"""The lock of a folder: a file beside it that names the one writing process and ends with it."""

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from refold.errors import FolderError

try:
    import fcntl
except ImportError:  # not a POSIX system: the lock file's existence is the lock
    fcntl = None

_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_held: set[int] = set()


class FolderLockedError(FolderError):
    """Another live process writes the folder."""


class FolderLock:
    """Holds `.{name}.lock` beside `destination` while the `with` body runs.

    The lock is `flock` if the file system has it, so it ends with its process. On other file systems the file's
    existence is the lock, and the lock of a dead process of this host is taken over.

    Args:
        destination: The folder to write; it need not exist, but its parent must.
        wait: Seconds to wait for another holder. They are few, because readers hold the lock only while they repair.

    Raises:
        FolderLockedError: Another live process holds the lock; the message names its pid and host.
        FolderError: The lock file cannot be made.
    """

    def __init__(self, destination: Path, wait: float = 0.5):
        self.path = destination.parent / f".{destination.name}.lock"
        self._destination = destination
        self._wait = wait
        self._fd: int | None = None

    def __enter__(self) -> "FolderLock":
        deadline = time.monotonic() + self._wait
        while not self._try():
            if time.monotonic() >= deadline:
                owner = self._owner()
                raise FolderLockedError(
                    f"{self._destination}: one writer at a time is required (process {owner.get('pid', 'unknown')} on "
                    f"{owner.get('host', 'unknown')} writes since {owner.get('time', 'unknown')}); wait or end it"
                )
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._fd is not None
        # Unlinked while the lock is held: a process that waits on this file finds it gone and starts again (see _try).
        with contextlib.suppress(OSError):
            self.path.unlink()
        _held.discard(self._fd)
        os.close(self._fd)
        self._fd = None

    def _try(self) -> bool:
        try:
            return self._try_flock() if fcntl is not None else self._try_exclusive()
        except OSError as error:
            if error.errno in _NO_FLOCK:
                return self._try_exclusive()
            raise FolderError(
                f"{self._destination}: a lock file beside it is required ({error.strerror}: {self.path}); "
                f"check the rights there"
            ) from None

    def _try_flock(self) -> bool:
        assert fcntl is not None
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have unlinked this very file between our open and our flock.
            if not _is_same_file(fd, self.path):
                os.close(fd)
                return False
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError:
            os.close(fd)
            with contextlib.suppress(OSError):
                if not self._owner():
                    self.path.unlink()
            raise
        self._claim(fd)
        return True

    def _try_exclusive(self) -> bool:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            if _is_dead(self._owner()):
                # Renamed, not unlinked, so that only one of two processes takes over a dead lock, and none a live one.
                with contextlib.suppress(OSError):
                    grave = self.path.with_name(f"{self.path.name}.{os.getpid()}")
                    os.rename(self.path, grave)
                    if _is_dead(_read_owner(grave)):
                        grave.unlink()
                    else:
                        os.rename(grave, self.path)
            return False
        self._claim(fd)
        return True

    def _claim(self, fd: int) -> None:
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "started": _start_time(os.getpid()),
        }
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(owner).encode(), 0)
        except OSError:
            # On a full disk the file would be empty, and no other process could tell its owner.
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(fd)
            raise
        _held.add(fd)
        self._fd = fd

    def _owner(self) -> dict[str, Any]:
        return _read_owner(self.path)


def _read_owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _is_dead(owner: dict[str, Any]) -> bool:
    """Tells whether a lock's owner is known to be dead; an owner on another host, or still unknown, counts as alive."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return False
    pid = owner["pid"]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return owner.get("started") != _start_time(pid)


def _start_time(pid: int) -> int | None:
    """Returns the process's start in clock ticks since boot, which reveals a reused pid; None without /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def _close_in_child() -> None:
    # A forked worker shares its parent's flock and would hold it past the parent's death.
    for fd in _held:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
