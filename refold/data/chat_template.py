"""Chat templates: code of a model folder that anybody may have made, rendered within bounds of time and size."""

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

MAX_SECONDS = 10.0
"""Of one rendering; templates of real models take milliseconds."""
MAX_GROWTH = 2**30
"""Bytes of memory that one rendering may take."""
MAX_CHARACTERS = 2**26
"""Of a rendered conversation."""
_INTERVAL, _IDLE_SECONDS = 0.05, 2.0


class TemplateFault(Exception):
    """A chat template does not take these messages, or does not end. The message is the reason, in one line."""


class _Stopped(BaseException):
    """Raised inside a rendering that is out of bounds; templates cannot catch it."""


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, messages: Any, **options: Any) -> Any:
    """Returns `tokenizer.apply_chat_template(messages, **options)`.

    Args:
        tokenizer: With a chat template.
        messages: One conversation, or a list of them.
        options: As transformers takes them.

    Raises:
        TemplateFault: The template raises, takes longer than `MAX_SECONDS`, or makes more text than `MAX_CHARACTERS`.
    """
    try:
        with _watchdog.bounded():
            found = tokenizer.apply_chat_template(messages, **options)
    except _Stopped:
        raise TemplateFault(f"the template takes more than {MAX_SECONDS:g} seconds or {MAX_GROWTH:,} bytes") from None
    except Exception as error:
        # A template is a program: it can raise whatever Python can.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise TemplateFault(reason) from error
    texts = [each for each in (found if isinstance(found, list) else [found]) if isinstance(each, str)]
    if sum(map(len, texts)) > MAX_CHARACTERS:
        raise TemplateFault(f"the template writes {sum(map(len, texts)):,} characters, more than {MAX_CHARACTERS:,}")
    return found


class _Watchdog:
    """One thread that stops renderings which are out of bounds, by an exception between two of their instructions.

    It lives while templates are rendered, and some seconds more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limits: dict[int, tuple[float, int]] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Bounds the body; it must not be entered twice by one thread."""
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
    """Gives a forked process a watchdog of its own: the thread is not in it, and the lock may be held there."""
    global _watchdog
    _watchdog = _Watchdog()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_watch_anew)


def _resident_bytes() -> int:
    """Bytes of memory of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
