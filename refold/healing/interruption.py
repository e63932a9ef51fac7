"""Signals that end a run: training writes a checkpoint first, other code is left through `with` blocks."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from refold.errors import HealError

_NAMES = ("SIGTERM", "SIGINT", "SIGHUP")


class HealInterrupted(HealError):
    """Raised when a signal ended the run and a checkpoint was written.

    Attributes:
        exit_code: exit status for the process: 128 plus the signal's number (143 for SIGTERM, 130 for SIGINT).
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Stopped(BaseException):
    """Raised when a signal ends the process outside of training.

    It is no `KeyboardInterrupt`, because command line libraries catch that, and no `Exception`, so that only `with` and
    `finally` blocks handle it: they remove unfinished files.

    Attributes:
        exit_code: 128 plus the signal's number.
    """

    def __init__(self, signal_number: int):
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


class SignalWatch:
    """Records the first signal while the `with` body runs; a second signal has its usual effect.

    Handlers can be set in the main thread only; in other threads no signal is recorded. A SIGHUP that `nohup` has
    switched off stays off.

    Attributes:
        received: the signal's number, None before the first signal.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "SignalWatch":
        self._previous = _set_handlers(self._note, also_ignored={"SIGTERM", "SIGINT"})
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        _restore_handlers(self._previous)
        self._previous = {}


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raises `Stopped` in the body at the first SIGTERM, SIGINT or SIGHUP; a second signal ends the process at once.

    Signals that were switched off when the process began (`nohup`, `&` in a script) stay off.
    """

    def stop(number: int, _: FrameType | None) -> None:
        _restore_handlers(previous)
        raise Stopped(number)

    previous = _set_handlers(stop)
    try:
        yield
    finally:
        _restore_handlers(previous)


def _set_handlers(handler: Any, also_ignored: frozenset[str] | set[str] = frozenset()) -> dict[int, Any]:
    """Sets a handler for the signals of this platform and returns the previous handlers."""
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in _NAMES:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and (name in also_ignored or signal.getsignal(number) != signal.SIG_IGN):
                previous[number] = signal.signal(number, handler)
    return previous


def _restore_handlers(previous: dict[int, Any]) -> None:
    for number, handler in previous.items():
        # None: the handler was not set from Python and cannot be set again.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
