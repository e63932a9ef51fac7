"""Every exception of a command is one line and an exit status; a traceback is printed only on request."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from refold.errors import RecipeError
from refold.healing.interruption import HealInterrupted


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


FAILURES = [
    (RecipeError("recipe: wrong"), 2, "recipe: wrong"),
    (HealInterrupted("checkpoint at step 3", signal.SIGTERM), 143, "checkpoint at step 3; to go on, type: refold plan"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError(), 1, "memory: more is required than there is"),
    (OutOfMemoryError("CUDA out of memory"), 1, "memory: more is required than there is (CUDA out of memory)"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "memory: more is required"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "memory: more is required"),
    (
        OSError(errno.ENOSPC, "No space left on device", "out/x"),
        1,
        "out/x: the system refused (No space left on device)",
    ),
    (
        OSError(errno.EROFS, "Read-only file system", "x"),
        1,
        "x: the system refused (Read-only",
    ),
    (
        PermissionError(errno.EACCES, "Permission denied", "x"),
        1,
        "x: the system refused (Permission",
    ),
    (OSError("no tokenizer there"), 1, "no tokenizer there"),
    (ValueError("a\nb"), 1, "internal error: ValueError: a; this is a bug of refold"),
    (RecursionError("too deep"), 1, "internal error: RecursionError"),
]


@pytest.fixture
def failing(command: Callable, shipped: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Runs `refold plan`, whose library function raises an exception."""

    def run(error: BaseException):
        def plan_all(*_: object) -> None:
            raise error

        monkeypatch.setattr("refold.planning.plan.plan_all", plan_all)
        return command("plan", shipped)

    return run


@pytest.mark.parametrize(("error", "status", "says"), FAILURES, ids=lambda each: str(each)[:40])
def test_an_exception_is_one_line_and_a_status(error: BaseException, status: int, says: str, failing: Callable) -> None:
    done = failing(error)
    assert (done.status, done.out) == (status, "")
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith(f"refold: {says}")


def test_the_traceback_is_printed_where_it_is_asked_for(failing: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "REFOLD_TRACEBACK=1" in failing(ValueError("x")).err
    monkeypatch.setenv("REFOLD_TRACEBACK", "1")
    told = failing(ValueError("x")).err
    assert told.startswith("Traceback")
    assert "in plan_all" in told


def test_a_message_without_an_end_is_cut(failing: Callable) -> None:
    assert len(failing(RecipeError("x" * 10**6)).err) < 5000


def test_a_usage_error_names_its_option_and_the_help(command: Callable, shipped: Path) -> None:
    done = command("plan", shipped, "--context", "x")
    assert (done.status, done.out) == (2, "")
    assert done.err == "refold: --context: must be a whole number (got 'x'); see `refold plan --help`\n"
    assert command("plan").err == "refold: Missing argument 'source'; see `refold plan --help`\n"


def test_no_arguments_print_the_help(command: Callable) -> None:
    done = command()
    assert done.status == 0
    assert "convert" in done.out


def test_ctrl_c_says_so_and_ends_with_130(shipped: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe"
    os.mkfifo(recipe)
    waiting = subprocess.Popen(
        [sys.executable, "-m", "refold", "plan", str(shipped), "-r", str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell ignores SIGINT for background processes.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        # Opens when the command does, which then waits for text that never comes.
        with recipe.open("w"):
            time.sleep(0.2)
            waiting.send_signal(signal.SIGINT)
            out, err = waiting.communicate(timeout=60)
    finally:
        waiting.kill()
    assert waiting.returncode == 130, err
    assert out == ""
    assert err.startswith("refold: interrupted")
    assert len(err.splitlines()) == 1


def test_a_reader_that_has_gone_is_no_error(shipped: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "refold", "plan", shipped],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""
