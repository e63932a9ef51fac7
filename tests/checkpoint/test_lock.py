import errno
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refold.checkpoint import lock
from refold.checkpoint.lock import FolderLock, FolderLockedError
from refold.errors import FolderError

HOLD = """
import sys, time
from pathlib import Path
from refold.checkpoint.lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold_elsewhere(destination: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(destination)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture(params=["flock", "exclusive"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "exclusive":
        monkeypatch.setattr(lock, "fcntl", None)
    return request.param


def test_the_lock_file_goes_when_the_lock_does(tmp_path: Path, kind: str) -> None:
    for _ in range(3):
        with FolderLock(tmp_path / "out"):
            owner = json.loads((tmp_path / ".out.lock").read_text())
            assert owner["pid"] == os.getpid()
        assert list(tmp_path.iterdir()) == []


def test_a_second_lock_names_the_owner(tmp_path: Path, kind: str) -> None:
    with (
        FolderLock(tmp_path / "out"),
        pytest.raises(
            FolderLockedError, match=rf"one writer at a time.*process {os.getpid()} on {socket.gethostname()} "
        ),
        FolderLock(tmp_path / "out", wait=0.1),
    ):
        pass
    with FolderLock(tmp_path / "out"), FolderLock(tmp_path / "other"):
        pass


def test_another_process_is_named_and_a_killed_one_is_taken_over(tmp_path: Path) -> None:
    process = hold_elsewhere(tmp_path / "out")
    try:
        with (
            pytest.raises(FolderLockedError, match=f"process {process.pid} on"),
            FolderLock(tmp_path / "out", wait=0.0),
        ):
            pass
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / ".out.lock").exists()
    with FolderLock(tmp_path / "out", wait=0.0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_without_flock_a_dead_owner_is_taken_over_and_a_living_or_foreign_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    path = tmp_path / ".out.lock"
    owner = {"pid": process.pid, "host": socket.gethostname(), "started": 1, "time": "then"}
    path.write_text(json.dumps(owner))
    with FolderLock(tmp_path / "out"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []

    # Our own pid with another start time: the pid was used again.
    path.write_text(json.dumps({**owner, "pid": os.getpid()}))
    with FolderLock(tmp_path / "out"):
        pass
    for living in (
        {**owner, "host": "elsewhere"},
        {**owner, "pid": os.getpid(), "started": lock._start_time(os.getpid())},
    ):
        path.write_text(json.dumps(living))
        with pytest.raises(FolderLockedError, match="one writer at a time"), FolderLock(tmp_path / "out", wait=0.1):
            pass
        assert path.exists()
    path.write_text("")
    with pytest.raises(FolderLockedError, match="process unknown on unknown"), FolderLock(tmp_path / "out", wait=0.1):
        pass


def test_a_file_system_without_flock_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with (
        FolderLock(tmp_path / "out"),
        pytest.raises(FolderLockedError, match=f"process {os.getpid()} "),
        FolderLock(tmp_path / "out", wait=0.1),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_waiting_lock_gets_in_when_the_holder_leaves(tmp_path: Path) -> None:
    process = hold_elsewhere(tmp_path / "out")
    process.terminate()
    try:
        with FolderLock(tmp_path / "out", wait=5.0):
            pass
    finally:
        process.wait()


def test_a_forked_worker_does_not_hold_the_lock_past_its_parent(tmp_path: Path) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork here")
    with FolderLock(tmp_path / "out"):
        child = os.fork()
        if child == 0:
            time.sleep(3)
            os._exit(0)
    try:
        with FolderLock(tmp_path / "out", wait=0.0):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_lock_that_cannot_be_made(tmp_path: Path) -> None:
    with (
        pytest.raises(FolderError, match=r"a lock file beside it is required .No such file"),
        FolderLock(tmp_path / "a" / "b"),
    ):
        pass


def test_a_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(FolderError, match="No space left on device"), FolderLock(tmp_path / "out"):
            pass
    assert list(tmp_path.iterdir()) == []
    with FolderLock(tmp_path / "out"):
        pass
