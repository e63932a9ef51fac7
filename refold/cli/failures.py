"""Lines on stderr and exit statuses for all exceptions of commands."""

import errno
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from refold.errors import RefoldError

TRACEBACK_VARIABLE = "REFOLD_TRACEBACK"
"""Environment variable; with any value but `0` the traceback is printed above the line."""
USER_MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130
MAX_LENGTH = 4_000
"""Most characters of a message to print."""
_REMEDIES = {
    errno.ENOSPC: "make room on that disk, or write elsewhere",
    errno.EDQUOT: "make room in your quota, or write elsewhere",
    errno.EROFS: "the file system is read-only: write elsewhere",
    errno.EACCES: "check the permissions, or choose another place",
    errno.EPERM: "check the permissions, or choose another place",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENOENT: "check the path",
    errno.EIO: "the disk failed: check it",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def one_line_each() -> Iterator[None]:
    """Ends the process with one line on stderr if the body raises.

    Raises:
        SystemExit: Status 2 for the user's mistakes, 130 after Ctrl-C, 1 for other exceptions.
    """
    try:
        yield
    except typer.Exit:
        raise
    except BrokenPipeError:
        # The reader of the output has ended, as in `refold plan ... | head`, so no message is printed.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.exit(FAILURE)
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        line, status = describe(error)
        if os.environ.get(TRACEBACK_VARIABLE, "0") != "0":
            traceback.print_exception(error)
        print(f"refold: {_shortened(line)}", file=sys.stderr)
        sys.exit(status)


def describe(error: BaseException) -> tuple[str, int]:
    """Returns the line for an exception, and the exit status."""
    if _is_usage_error(error):
        return _usage(error), USER_MISTAKE
    if isinstance(getattr(error, "exit_code", None), int):
        # A signal ended a command, which wrote a checkpoint first.
        return f"{error}; to go on, type: {shlex.join(['refold', *sys.argv[1:]])}", error.exit_code  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(error, RefoldError):
        return str(error), USER_MISTAKE
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: no unfinished folder is kept; the same command begins again, or goes on", INTERRUPTED
    if _is_out_of_memory(error):
        reason = f" ({_first_line(error)})" if str(error) else ""
        return f"memory: more is required than there is{reason}; close other programs, or give less at a time", FAILURE
    if isinstance(error, OSError):
        return _system(error), FAILURE
    return (
        f"internal error: {type(error).__name__}: {_first_line(error)}; this is a bug of refold: run the command again "
        f"with {TRACEBACK_VARIABLE}=1 and report the traceback",
        FAILURE,
    )


def _is_usage_error(error: BaseException) -> bool:
    # typer's classes for usage errors have no common public name in all its versions.
    return hasattr(error, "format_message") and hasattr(error, "ctx")


def _usage(error: BaseException) -> str:
    context = getattr(error, "ctx", None)
    parameter, message = getattr(error, "param", None), str(getattr(error, "message", "")).rstrip(".")
    if parameter is None or not message:
        message = str(error.format_message()).rstrip(".")  # pyright: ignore[reportAttributeAccessIssue]
    else:
        options = [name for name in parameter.opts if name.startswith("-")]
        name = max(options, key=len) if options else (parameter.metavar or str(parameter.name).upper())
        message = f"{name}: {message}"
    help_command = f"; see `{context.command_path} --help`" if context is not None else ""
    return " ".join(message.split()) + help_command


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # Compared by name, so that torch is not imported: OutOfMemoryError on devices, RuntimeError on the CPU.
    said = str(error)
    is_allocation = "can't allocate memory" in said or "not enough memory" in said
    return type(error).__name__ == "OutOfMemoryError" or (isinstance(error, RuntimeError) and is_allocation)


def _system(error: OSError) -> str:
    if error.errno is None:
        return f"{_first_line(error)}; check the file or folder"
    where = f"{error.filename}: " if error.filename is not None else ""
    remedy = _REMEDIES.get(error.errno, f"see {TRACEBACK_VARIABLE}=1 for the place")
    return f"{where}the system refused ({error.strerror}); {remedy}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:300]


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]} ... ({len(text):,} characters)"
