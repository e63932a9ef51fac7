"""Rendering of chat templates within limits of time and memory, because a template is code from a model folder."""

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

MAX_SECONDS = 10.0
"""Limit for one rendering; templates of real models take milliseconds."""
MAX_GROWTH = 2**30
"""Limit in bytes for the memory that one rendering takes."""
MAX_CHARACTERS = 2**26
"""Limit for the length of a rendered conversation."""
_INTERVAL, _IDLE_SECONDS = 0.05, 2.0


class TemplateFault(Exception):
    """A chat template refuses the messages or exceeds a limit; the error's text is the reason in one line."""


class _Stopped(BaseException):
    """Raised inside a rendering that exceeds a limit; templates cannot catch it."""


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, messages: Any, **options: Any) -> Any:
    """Returns `tokenizer.apply_chat_template(messages, **options)`.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: One conversation or a list of conversations.
        options: Options of transformers' method.

    Raises:
        TemplateFault: The template raises, takes longer than `MAX_SECONDS`, or writes more than `MAX_CHARACTERS`.
    """
    try:
        with _watchdog.bounded():
            found = tokenizer.apply_chat_template(messages, **options)
    except _Stopped:
        raise TemplateFault(f"the template takes more than {MAX_SECONDS:g} seconds or {MAX_GROWTH:,} bytes") from None
    except Exception as error:
        # A template is a program, so it can raise any exception of Python.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise TemplateFault(reason) from error
    texts = [each for each in (found if isinstance(found, list) else [found]) if isinstance(each, str)]
    if sum(map(len, texts)) > MAX_CHARACTERS:
        raise TemplateFault(f"the template writes {sum(map(len, texts)):,} characters, more than {MAX_CHARACTERS:,}")
    return found


class _Watchdog:
    """A thread that stops renderings which exceed a limit, by an exception raised in their thread.

    The thread ends some seconds after the last rendering.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limits: dict[int, tuple[float, int]] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Applies the limits to the body of `with`; one thread must not enter it twice."""
        caller = threading.get_ident()
        with self._lock:
            self._limits[caller] = time.monotonic() + MAX_SECONDS, _resident_bytes() + MAX_GROWTH
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._watch, name="refold-templates", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._limits.pop(caller, None)

    def _watch(self) -> None:
        idle_since = time.monotonic()
        while True:
            time.sleep(_INTERVAL)
            now = time.monotonic()
            with self._lock:
                if self._limits:
                    idle_since = now
                elif now - idle_since > _IDLE_SECONDS:
                    self._thread = None
                    return
                for caller, (deadline, most_bytes) in list(self._limits.items()):
                    if now > deadline or _resident_bytes() > most_bytes:
                        del self._limits[caller]
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(caller), ctypes.py_object(_Stopped))


_watchdog = _Watchdog()


def _watch_anew() -> None:
    """Makes a new watchdog in a forked process, which has no copy of the thread and may have a locked lock."""
    global _watchdog
    _watchdog = _Watchdog()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_watch_anew)


def _resident_bytes() -> int:
    """Returns the resident memory of this process in bytes, or 0 if the system does not report it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
