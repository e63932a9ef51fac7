"""Encoders of documents into tokens, and parallel encoding."""

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

_CHARACTERS_PER_TOKEN = 16  # well above the mean of any language; limits how much of a long document is encoded
_SLACK_TOKENS = 256


class EncodedDocument(NamedTuple):
    """The tokens of one document.

    Attributes:
        ids: `[n]`, in the encoder's dtype, start token included.
        is_target: Bool `[n]`, the tokens to predict; None: all of them.
        num_bytes: UTF-8 bytes of the text of the tokens (0 for a start token).
    """

    ids: np.ndarray
    is_target: np.ndarray | None
    num_bytes: int


class Encoder(ABC):
    """Encodes documents of one form into tokens.

    Attributes:
        tokenizer: The tokenizer.
        dtype: Dtype of the ids: uint16 for a vocabulary below 65,536, else uint32.
        document_start: Id of the token put before each document, or None.
        has_targets: Whether a mask says which tokens are targets.
        max_threads: Most threads that may encode at once; None: any number.
    """

    document_start: int | None = None
    has_targets = False
    max_threads: int | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.dtype = np.dtype(np.uint16 if len(tokenizer) < 2**16 else np.uint32)
        if tokenizer.is_fast:
            # Set once, because changing them while another thread encodes is an error. transformers sets them per call.
            backend = self._backend
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))

    @abstractmethod
    def encode(self, documents: Sequence[Any], room: int | None) -> list[EncodedDocument]:
        """Returns the tokens of documents; a document much longer than `room` tokens may be cut after `room`."""

    @abstractmethod
    def num_characters(self, document: Any) -> int:
        """Returns the approximate size of a document.

        Raises:
            DataError: The document is not of the encoder's form.
        """

    def cut(self, document: EncodedDocument, room: int) -> EncodedDocument:
        """Returns the first `room` tokens of a document, with the number of bytes of their text."""
        if len(document.ids) <= room:
            return document
        ids = document.ids[:room]
        texts = ids if self.document_start is None else ids[1:]
        text: Any = self.tokenizer.decode(texts.tolist(), clean_up_tokenization_spaces=False)
        size = min(document.num_bytes, len(text.encode("utf-8", "replace")))
        return EncodedDocument(ids, None if document.is_target is None else document.is_target[:room], size)

    def key(self) -> list[Any]:
        """Returns all settings that the tokens of a document depend on, as JSON."""
        if self.tokenizer.is_fast:
            state = json.loads(self._backend.to_str())
            # Earlier calls may have set these two; encoding here uses neither.
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
    """Encodes texts and puts a start token before each.

    Special tokens that are written in a text are recognised, as by default. The tokenizer's own bos/eos handling is off
    (see `document_start_token`).
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
            # The cut of the text changes the tokens next to it, so these must not be among the first `room`.
            if len(text) > limit and len(arrays[index]) < room + _SLACK_TOKENS:
                arrays[index] = self._all_ids([text])[0]
        return arrays

    def _all_ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.tokenizer.is_fast:
            # transformers' own call holds the interpreter's lock three times as long per token.
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]
        # verbose=False: no warning about documents longer than the model's context.
        lists = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.array(ids, dtype=self.dtype) for ids in lists["input_ids"]]


def document_start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the id to put before each document: bos if the tokenizer has one, else eos, else None."""
    ids: Any = tokenizer  # transformers annotates special tokens as str, int or lists of these
    return ids.bos_token_id if ids.bos_token_id is not None else ids.eos_token_id


def digest(key: list[Any]) -> str:
    """Returns a hash of a key, for the name of a cache entry."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]


BATCH_CHARACTERS = 2**20
_MAX_CHARACTERS_PER_TOKEN = 16


class Encoding:
    """Iterates once over the encoded documents, empty ones included, and cuts the last one at the budget.

    Several threads encode batches of about a million characters. The tokenizer's own code runs outside the
    interpreter's lock and splits a batch between its own threads, so a few long documents also keep all cores busy.
    Memory is limited to about `workers` batches. The result is in the order of the documents for any number of threads.

    Attributes:
        num_tokens: Tokens yielded so far.
        is_whole_source: Whether the documents ended before the budget; valid after the iteration.
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
        """Keeps the arguments; encoding begins with the iteration.

        Args:
            documents: The documents. The thread that iterates reads them, a few batches ahead of the results.
            encoder: Encodes the documents.
            budget: Most tokens, start tokens included; None: all.
            workers: Number of threads that encode; None: `default_workers()`.
            on_progress: Called after every batch with the number of tokens so far.
            batch_characters: Approximate characters of a batch.
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
        """Returns whether the budget may need more than the characters that are being encoded."""
        room = self._remaining()
        return room is None or num_characters < _MAX_CHARACTERS_PER_TOKEN * room

    def _batch(self) -> tuple[int, list[Any]]:
        """Returns the next documents and their characters: about one batch, or fewer for the rest of the budget."""
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
    """Returns the number of threads that may encode: one per core of this process, or as the environment says.

    `TOKENIZERS_PARALLELISM=false` asks for one thread, `RAYON_NUM_THREADS` for a number of threads.
    """
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("0", "false", "off", "no", "n", "f"):
        return 1
    wish = os.environ.get("RAYON_NUM_THREADS", "")
    if wish.isdigit() and int(wish):
        return int(wish)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
