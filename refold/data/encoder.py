"""Encodes documents into tokens, alone and in parallel."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from refold.errors import DataError

_CHARACTERS_PER_TOKEN = 16  # well above any language's mean; only decides how much of a long last document is looked at
_SLACK_TOKENS = 256


class EncodedDocument(NamedTuple):
    """One document's tokens.

    Attributes:
        ids: `[n]`, in the encoder's dtype, start token included.
        is_target: bool `[n]`, whether a token is to be predicted; None: all are.
        num_bytes: UTF-8 bytes of what the tokens stand for (a start token has none).
    """

    ids: np.ndarray
    is_target: np.ndarray | None
    num_bytes: int


class Encoder(ABC):
    """Turns documents of one form into tokens.

    Attributes:
        tokenizer: what it does so with.
        dtype: of the ids: uint16 where the vocabulary is below 65,536, else uint32.
        document_start: id of the token put before each document, None where none is.
        has_targets: whether some tokens are not to be predicted.
        max_threads: how many threads may encode at once; None: any number.
    """

    document_start: int | None = None
    has_targets = False
    max_threads: int | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.dtype = np.dtype(np.uint16 if len(tokenizer) < 2**16 else np.uint32)
        if tokenizer.is_fast:
            # Set once: changing these while another thread encodes is an error. transformers sets them at every call.
            backend = self._backend
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))

    @abstractmethod
    def encode(self, documents: Sequence[Any], room: int | None) -> list[EncodedDocument]:
        """Returns the tokens of whole documents; of one far longer than `room` tokens, more than `room` will do."""

    @abstractmethod
    def num_characters(self, document: Any) -> int:
        """Returns a document's size, roughly.

        Raises:
            DataError: it is not of the encoder's form.
        """

    def cut(self, document: EncodedDocument, room: int) -> EncodedDocument:
        """Returns the first `room` tokens of a document, with the bytes these stand for."""
        if len(document.ids) <= room:
            return document
        ids = document.ids[:room]
        texts = ids if self.document_start is None else ids[1:]
        text: Any = self.tokenizer.decode(texts.tolist(), clean_up_tokenization_spaces=False)
        size = min(document.num_bytes, len(text.encode("utf-8", "replace")))
        return EncodedDocument(ids, None if document.is_target is None else document.is_target[:room], size)

    def key(self) -> list[Any]:
        """Lists everything the tokens of a document depend on, as JSON."""
        if self.tokenizer.is_fast:
            state = json.loads(self._backend.to_str())
            # Calls leave these two behind; encoding as done here has neither.
            del state["truncation"], state["padding"]
        else:
            state = sorted(self.tokenizer.get_vocab().items())
        return [
            type(self.tokenizer).__name__,
            tokenizers.__version__,
            state,
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
        ]

    @property
    def _backend(self) -> Any:
        tokenizer: Any = self.tokenizer
        return tokenizer.backend_tokenizer


class TextEncoder(Encoder):
    """Encodes texts, each behind a start token.

    Special tokens written out in a text are recognised, as the tokenizer does by default; its own bos/eos handling is
    off, see `document_start_token`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self.document_start = document_start_token(tokenizer)

    def encode(self, documents: Sequence[Any], room: int | None) -> list[EncodedDocument]:
        prefix = np.array([] if self.document_start is None else [self.document_start], dtype=self.dtype)
        ids = self._ids(documents, room)
        return [
            EncodedDocument(np.concatenate([prefix, array]), None, len(text.encode()))
            for text, array in zip(documents, ids, strict=True)
        ]

    def num_characters(self, document: Any) -> int:
        if not isinstance(document, str):
            raise DataError(f"data: texts are required (got a {type(document).__name__}); ask for chat data")
        return len(document)

    def _ids(self, texts: Sequence[str], room: int | None) -> list[np.ndarray]:
        if room is None:
            return self._all_ids(texts)
        limit = _CHARACTERS_PER_TOKEN * (room + _SLACK_TOKENS)
        arrays = self._all_ids([text[:limit] for text in texts])
        for index, text in enumerate(texts):
            # The cut changes the tokens beside it, so they must lie past the room.
            if len(text) > limit and len(arrays[index]) < room + _SLACK_TOKENS:
                arrays[index] = self._all_ids([text])[0]
        return arrays

    def _all_ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.tokenizer.is_fast:
            # Not through transformers, which holds the interpreter's lock three times as long per token.
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]
        # verbose=False: a document longer than the model's context is no mistake here.
        lists = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.array(ids, dtype=self.dtype) for ids in lists["input_ids"]]


def document_start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the id put before each document: bos where the tokenizer has one, else eos, else None."""
    ids: Any = tokenizer  # transformers types every special token as str, int or lists of them
    return ids.bos_token_id if ids.bos_token_id is not None else ids.eos_token_id


def digest(key: list[Any]) -> str:
    """Returns the hash that names what was made from a key."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]


BATCH_CHARACTERS = 2**20
_MAX_CHARACTERS_PER_TOKEN = 16


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
        return room is None or num_characters < _MAX_CHARACTERS_PER_TOKEN * room

    def _batch(self) -> tuple[int, list[Any]]:
        """Takes documents of about a batch's characters, and not many more than the remaining budget can use."""
        room = self._remaining()
        limit = self._batch_characters
        if room is not None:
            limit = min(limit, _MAX_CHARACTERS_PER_TOKEN * room)
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
