"""SIGTERM and SIGINT during training: the step is finished, a checkpoint written, then the run ends."""

import signal
import threading
from types import FrameType
from typing import Any

from refold.errors import HealError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class HealInterrupted(HealError):
    """A signal ended the run after a checkpoint.

    Attributes:
        exit_code: what the process should end with: 128 and the signal's number (143 for SIGTERM, 130 for SIGINT).
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class SignalWatch:
    """Notes the first signal while the `with` body runs; a second one acts as it would have without us.

    Handlers can be set in the main thread only; elsewhere nothing is watched.

    Attributes:
        received: the signal's number, None as long as there was none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "SignalWatch":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not set from Python and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
