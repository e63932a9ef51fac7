"""Tokens handed over while `generate` is still at work in its own thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer


class TokenStream(BaseStreamer):
    """The new tokens of one sequence, as they are made.

    A context manager to be iterated over inside its body: leaving the body stops the work after the token it is at, and
    an error in the work is raised where the tokens are read.

    Args:
        work: Runs `generate` with the streamer and the stopping criterion it is given.
    """

    def __init__(self, work: Callable[[BaseStreamer, StoppingCriteria], Any]):
        self._work = work
        # None marks the end.
        self._queue: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._has_prompt = False
        self._thread = threading.Thread(target=self._run, name="refold-generate", daemon=True)

    def __enter__(self) -> "TokenStream":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def __iter__(self) -> Iterator[int]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def put(self, value: torch.Tensor) -> None:
        """Takes what `generate` gives: first the prompt, then token by token."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        for token in value.reshape(-1).tolist():
            self._queue.put(token)

    def end(self) -> None:
        """Called by `generate` when it is done; the end is marked when the thread is."""

    def _run(self) -> None:
        try:
            self._work(self, _Stopped(self._stopped))
        except BaseException as error:
            self._queue.put(error)
        finally:
            self._queue.put(None)


class _Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device, dtype=torch.bool)
