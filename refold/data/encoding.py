"""Encoding of many documents, on all cores, in order, up to a budget."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from refold.data.encoder import EncodedDocument, Encoder

BATCH_CHARACTERS = 2**20
_CHARACTERS_PER_TOKEN = 16


class Encoding:
    """Iterates once over encoded documents, one for each, empty ones too; the last one is cut at the budget.

    Batches of about a million characters are encoded by several threads. The tokenizer's own code runs outside the
    interpreter's lock and splits a batch between its own threads too, so a few long documents keep all cores busy as
    well as many short ones; memory is bounded by `workers` batches. The order, and so the result, is that of the
    documents, whatever the number of threads.

    Attributes:
        num_tokens: yielded so far.
        is_whole_source: whether the documents ended before the budget did; known at the end.
    """

    def __init__(
        self,
        documents: Iterable[Any],
        encoder: Encoder,
        *,
        budget: int | None,
        workers: int | None = None,
        on_progress: Callable[[int], None] | None = None,
        batch_characters: int = BATCH_CHARACTERS,
    ) -> None:
        """Encodes nothing yet.

        Args:
            documents: read from the thread that iterates, a little ahead of what is yielded.
            encoder: what turns them into tokens.
            budget: tokens, start tokens included; None: all.
            workers: threads that encode; None: `default_workers()`.
            on_progress: called with the number of tokens so far after every batch.
            batch_characters: about how much a thread encodes at a time.
        """
        self.num_tokens = 0
        self.is_whole_source = False
        self._documents = iter(documents)
        self._encoder = encoder
        self._budget = budget
        self._workers = min(workers or default_workers(), encoder.max_threads or 2**10)
        self._on_progress = on_progress
        self._batch_characters = batch_characters

    def __iter__(self) -> Generator[EncodedDocument, None, None]:
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="encode")
        pending: deque[tuple[int, Future[list[EncodedDocument]]]] = deque()
        was_cut = False
        try:
            while not was_cut and self._remaining() != 0:
                while len(pending) <= self._workers and self._wants_more(sum(size for size, _ in pending)):
                    size, batch = self._batch()
                    if not batch:
                        break
                    pending.append((size, pool.submit(self._encoder.encode, batch, self._remaining())))
                if not pending:
                    break
                for document in pending.popleft()[1].result():
                    room = self._remaining()
                    if room == 0:
                        was_cut = True
                        break
                    part = document if room is None else self._encoder.cut(document, room)
                    was_cut = len(part.ids) < len(document.ids)
                    self.num_tokens += len(part.ids)
                    yield part
                if self._on_progress is not None:
                    self._on_progress(self.num_tokens)
            self.is_whole_source = not was_cut and not pending and next(self._documents, None) is None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _remaining(self) -> int | None:
        return None if self._budget is None else self._budget - self.num_tokens

    def _wants_more(self, num_characters: int) -> bool:
        """Says whether the budget can use more than what is being encoded."""
        room = self._remaining()
        return room is None or num_characters < _CHARACTERS_PER_TOKEN * room

    def _batch(self) -> tuple[int, list[Any]]:
        """Takes documents of about a batch's characters, and not many more than the remaining budget can use."""
        room = self._remaining()
        limit = self._batch_characters
        if room is not None:
            limit = min(limit, _CHARACTERS_PER_TOKEN * room)
        batch: list[Any] = []
        taken = 0
        while taken < limit and (document := next(self._documents, None)) is not None:
            taken += self._encoder.num_characters(document)
            batch.append(document)
        return taken, batch


def default_workers() -> int:
    """Returns how many threads may encode: one per core this process may use, or what the tokenizer's own settings say.

    `TOKENIZERS_PARALLELISM=false` asks for one, `RAYON_NUM_THREADS` for a number.
    """
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("0", "false", "off", "no", "n", "f"):
        return 1
    wish = os.environ.get("RAYON_NUM_THREADS", "")
    if wish.isdigit() and int(wish):
        return int(wish)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
