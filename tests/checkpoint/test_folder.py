import ctypes
import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refold.checkpoint import folder as folder_module
from refold.checkpoint.folder import AtomicFolder, repair, settle
from refold.checkpoint.lock import FolderLock
from refold.checkpoint.manifest import check, verify, write_manifest
from refold.errors import FolderError


def fill(path: Path, version: int) -> None:
    for name in ("config.json", "a", "b"):
        (path / name).write_text(json.dumps(version))
    (path / "sub").mkdir()
    (path / "sub" / "c").write_text(json.dumps(version))


def make(destination: Path, version: int, overwrite: bool = False) -> None:
    with AtomicFolder(destination, overwrite=overwrite) as out:
        fill(out.path, version)


def version_of(folder: Path) -> int:
    check(folder)
    verify(folder)
    versions = {json.loads((folder / name).read_text()) for name in ("config.json", "a", "b", "sub/c")}
    assert len(versions) == 1, f"torn: {versions}"
    return versions.pop()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["exchange", "renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "renames":
        monkeypatch.setattr(folder_module, "_exchange", lambda one, other: False)
    return request.param


def test_a_folder_appears_whole_and_nothing_else(tmp_path: Path) -> None:
    with AtomicFolder(tmp_path / "x" / "out") as out:
        fill(out.path, 1)
        assert not (tmp_path / "x" / "out").exists()
        assert out.path.parent == tmp_path / "x"
    assert version_of(tmp_path / "x" / "out") == 1
    assert names(tmp_path / "x") == ["out"]


def test_known_hashes_reach_the_manifest(tmp_path: Path) -> None:
    with AtomicFolder(tmp_path / "out") as out:
        fill(out.path, 1)
        out.hashes["a"] = "0" * 64
    with pytest.raises(FolderError, match=r"a \(content differs"):
        verify(tmp_path / "out")


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        make(tmp_path / "out", 1)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "manifest.json").stat().st_mode & 0o777 == 0o640


def test_overwriting_replaces_the_whole_folder(tmp_path: Path, swap: str) -> None:
    make(tmp_path / "out", 1)
    (tmp_path / "out" / "extra").write_text("old")
    make(tmp_path / "out", 2, overwrite=True)
    assert version_of(tmp_path / "out") == 2
    assert not (tmp_path / "out" / "extra").exists()
    assert names(tmp_path) == ["out"]


def test_exchange_works_on_linux(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("renameat2 is Linux's")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert folder_module._exchange(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path / "a") == ["b"]
    with pytest.raises(OSError, match="No such file"):
        folder_module._exchange(tmp_path / "a", tmp_path / "gone")


def test_exchange_says_no_where_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: type("libc", (), {"renameat2": staticmethod(refuse)}))
    assert not folder_module._exchange(tmp_path, tmp_path)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: type("libc", (), {}))
    assert not folder_module._exchange(tmp_path, tmp_path)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not folder_module._exchange(tmp_path, tmp_path)


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "out", 1)
    with (
        pytest.raises(FolderError, match=r"out: a new folder is required \(it exists\).*--overwrite"),
        AtomicFolder(tmp_path / "out"),
    ):
        pass
    assert version_of(tmp_path / "out") == 1
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("content", ["config.json", "notes.txt", "manifest.json"])
def test_a_users_own_folder_is_never_overwritten(tmp_path: Path, content: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / content).write_text("{}")
    with pytest.raises(FolderError, match="never overwritten"), AtomicFolder(tmp_path / "mine", overwrite=True):
        pass
    assert names(tmp_path / "mine") == [content]


def test_a_folder_filled_meanwhile_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="never overwritten"), AtomicFolder(tmp_path / "out", overwrite=True) as out:  # noqa: PT012
        fill(out.path, 1)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes").touch()
    assert names(tmp_path / "out") == ["notes"]
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", 1)
    assert version_of(tmp_path / "empty") == 1
    (tmp_path / "file").touch()
    with (
        pytest.raises(FolderError, match=r"file: a folder's place is required .got a file"),
        AtomicFolder(tmp_path / "file"),
    ):
        pass
    with pytest.raises(FolderError, match="a writable place is required"), AtomicFolder(tmp_path / "file" / "x" / "y"):
        pass


def test_a_linked_destination_is_written_where_it_points(tmp_path: Path, swap: str) -> None:
    make(tmp_path / "disk" / "real", 1)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    make(tmp_path / "link", 2, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert version_of(tmp_path / "disk" / "real") == 2
    assert names(tmp_path / "disk") == ["real"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), OSError(errno.EIO, "bad disk")])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    make(tmp_path / "out", 1)
    for destination in (tmp_path / "out", tmp_path / "new" / "deep" / "out"):
        with pytest.raises(type(error)), AtomicFolder(destination, overwrite=True) as out:  # noqa: PT012
            fill(out.path, 2)
            raise error
    assert version_of(tmp_path / "out") == 1
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("step", ["_flush_files", "write_manifest", "_flush_folders", "_swap_in", "flush"])
def test_an_interrupt_while_finishing_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, swap: str
) -> None:
    make(tmp_path / "out", 1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), AtomicFolder(tmp_path / "out", overwrite=True) as out:  # noqa: PT012
        fill(out.path, 2)
        monkeypatch.setattr(folder_module, step, interrupt)
    assert version_of(tmp_path / "out") == 1
    assert names(tmp_path) == ["out"]


def test_an_interrupt_between_the_two_renames_restores_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "out", 1)
    monkeypatch.setattr(folder_module, "_exchange", lambda one, other: False)
    rename = os.rename

    def interrupt(one: Path, other: Path) -> None:
        if ".partial-" in one.name:
            raise KeyboardInterrupt
        rename(one, other)

    with pytest.raises(KeyboardInterrupt), AtomicFolder(tmp_path / "out", overwrite=True) as out:  # noqa: PT012
        fill(out.path, 2)
        monkeypatch.setattr(os, "rename", interrupt)
    assert version_of(tmp_path / "out") == 1
    assert names(tmp_path) == ["out"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(FolderError, match=r"out: disk full \(No space left on device; free: \d+ bytes\)"),
        AtomicFolder(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(FolderError, match=rf"{2**60} bytes of disk are required \(free: \d+\)"),
        AtomicFolder(tmp_path / "out", needed_bytes=2**60),
    ):
        pass
    assert names(tmp_path) == []


def test_a_second_writer_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    with AtomicFolder(tmp_path / "out") as out:
        fill(out.path, 1)
        with (
            pytest.raises(FolderError, match=f"one writer at a time is required .process {os.getpid()}"),
            AtomicFolder(tmp_path / "out"),
        ):
            pass
        repair(tmp_path / "out")
        assert out.path.exists()
    assert version_of(tmp_path / "out") == 1


def test_repair_restores_the_old_folder(tmp_path: Path) -> None:
    make(tmp_path / "out", 1)
    (tmp_path / "out").rename(tmp_path / ".out.old")
    assert version_of(settle(tmp_path / "out")) == 1
    assert names(tmp_path) == ["out"]


def test_repair_removes_the_old_folder_where_the_new_one_stands_and_stale_partials(tmp_path: Path) -> None:
    make(tmp_path / "out", 2)
    make(tmp_path / ".out.old", 1)
    (tmp_path / ".out.partial-0123456789abcdef").mkdir()
    repair(tmp_path / "out")
    assert version_of(tmp_path / "out") == 2
    assert names(tmp_path) == ["out"]


def test_repair_touches_only_what_is_ours(tmp_path: Path) -> None:
    make(tmp_path / "out", 1)
    mine = [".out.old", ".out.partial-notes", ".out.partial-0123456789abcdef.old", ".other.partial-0123456789abcdef"]
    for name in mine:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").touch()
    repair(tmp_path / "out")
    make(tmp_path / "out", 2, overwrite=True)
    assert names(tmp_path) == sorted([*mine, "out"])


def test_a_name_in_the_way_of_the_swap_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "out", 1)
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "notes").touch()
    monkeypatch.setattr(folder_module, "_exchange", lambda one, other: False)
    with pytest.raises(FolderError, match=r"\.out\.old: this name is required to be free"):
        make(tmp_path / "out", 2, overwrite=True)
    assert version_of(tmp_path / "out") == 1
    assert names(tmp_path / ".out.old") == ["notes"]


def test_a_reader_waits_out_a_live_swap(tmp_path: Path) -> None:
    import threading

    make(tmp_path / "out", 1)
    with FolderLock(tmp_path / "out"):
        (tmp_path / "out").rename(tmp_path / ".out.old")
        timer = threading.Timer(0.2, lambda: (tmp_path / ".out.old").rename(tmp_path / "out"))
        timer.start()
        assert version_of(settle(tmp_path / "out")) == 1
        timer.join()


def test_debris_that_cannot_be_removed_does_not_hinder_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out", 1)
    (tmp_path / ".out.partial-0123456789abcdef").mkdir()

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    repair(tmp_path / "out")
    monkeypatch.undo()
    assert version_of(tmp_path / "out") == 1
    (tmp_path / "out").rename(tmp_path / ".out.old")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FolderError, match=r"a lock file beside it is required .Permission denied"):
        repair(tmp_path / "out")


def test_a_torn_folder_is_not_settled(tmp_path: Path) -> None:
    make(tmp_path / "out", 1)
    (tmp_path / "out" / "b").unlink()
    with pytest.raises(FolderError, match=r"b \(missing\)"):
        settle(tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert settle(tmp_path / "plain") == tmp_path / "plain"


WRITER = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[5])
from refold.checkpoint import folder, lock, manifest
from refold.checkpoint.folder import AtomicFolder
destination, kind, first, at_line = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if kind == "renames":
    folder._exchange = lambda one, other: False
seen = 0
watched = {folder.__file__, lock.__file__, manifest.__file__, "<string>"}
def trace(frame, event, arg):
    global seen
    if frame.f_code.co_filename not in watched:
        return None
    if event == "line":
        seen += 1
        if seen == at_line:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace
def write(version):
    with AtomicFolder(destination, overwrite=True) as out:
        for name in ("config.json", "a", "b"):
            (out.path / name).write_text(json.dumps(version))
        (out.path / "sub").mkdir()
        (out.path / "sub" / "c").write_text(json.dumps(version))
print("ready", flush=True)
if at_line >= 0:
    sys.settrace(trace)
    write(first)
    sys.settrace(None)
    print(seen)
else:
    while True:
        write(first)
        first += 1
"""


def start_writer(destination: Path, kind: str, first: int, at_line: int) -> "subprocess.Popen[str]":
    root = str(Path(folder_module.__file__).parents[2])
    arguments = [sys.executable, "-c", WRITER, str(destination), kind, str(first), str(at_line), root]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def kill_while_overwriting(tmp_path: Path, kind: str, count: int) -> None:
    chance = random.Random(count)
    make(tmp_path / "out", 0)
    newest = 0
    for attempt in range(count):
        process = start_writer(tmp_path / "out", kind, 1000 * (attempt + 1), -1)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.1))
        process.kill()
        process.wait()
        found = version_of(settle(tmp_path / "out"))
        assert found >= newest
        newest = found
    make(tmp_path / "out", 1, overwrite=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["exchange", "renames"])
def test_a_kill_leaves_the_old_or_the_new_folder(tmp_path: Path, kind: str) -> None:
    kill_while_overwriting(tmp_path, kind, 3)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["exchange", "renames"])
def test_twenty_kills_leave_the_old_or_the_new_folder(tmp_path: Path, kind: str) -> None:
    kill_while_overwriting(tmp_path, kind, 20)


def kill_at_lines(tmp_path: Path, kind: str, count: int | None) -> None:
    """Kills the writer just before chosen lines of our own code, all of them where `count` is None."""
    make(tmp_path / "out", 0)
    output, _ = start_writer(tmp_path / "out", kind, 1, 0).communicate()
    total = int(output.split()[1])
    assert total > 100
    lines = range(1, total + 1)
    seen = {version_of(tmp_path / "out")}
    for line in lines if count is None else random.Random(0).sample(lines, count):
        previous = version_of(tmp_path / "out")
        process = start_writer(tmp_path / "out", kind, previous + 1, line)
        process.communicate()
        assert process.returncode == -9
        found = version_of(settle(tmp_path / "out"))
        assert found in (previous, previous + 1)
        assert not [name for name in names(tmp_path) if "old" in name or "partial" in name]
        seen.add(found)
    assert len(seen) > 1
    make(tmp_path / "out", 1, overwrite=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["exchange", "renames"])
def test_a_kill_at_chosen_lines_leaves_the_old_or_the_new_folder(tmp_path: Path, kind: str) -> None:
    kill_at_lines(tmp_path, kind, 20)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["exchange", "renames"])
def test_a_kill_at_any_line_leaves_the_old_or_the_new_folder(tmp_path: Path, kind: str) -> None:
    kill_at_lines(tmp_path, kind, None)


def test_a_write_in_place_would_be_caught(tmp_path: Path) -> None:
    """The control: the same look at a folder whose files were overwritten one by one must find it torn."""
    fill(tmp_path, 1)
    write_manifest(tmp_path)
    (tmp_path / "b").write_text(json.dumps(2))
    with pytest.raises(FolderError, match=r"b \(content differs"):
        version_of(tmp_path)
