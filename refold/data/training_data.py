"""Training sequences addressed by an integer: stored in shards or made while streaming."""

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refold.checkpoint.atomic_file import write_json
from refold.checkpoint.lock import FolderLock
from refold.data.encoder import BATCH_CHARACTERS, Encoder, Encoding, digest
from refold.data.packing import PackedSequence, PackedSequences, stack
from refold.data.readers import DataSource
from refold.data.shards import ShardWriter, TokenShards, cached, make_folder
from refold.data.streams import DocumentStream, Feeder, StreamPlace
from refold.errors import DataError


class TrainingData(ABC):
    """An endless list of packed sequences.

    The sequence at a position depends on data, seed, context and position alone. So a position is all there is to
    resume from, and several processes share the work by reading different positions of one list.

    Attributes:
        name: of the data, for messages.
        identity: digest of everything the sequences depend on.
        tokens_per_epoch: tokens after which sequences come again; None where that is not known.
    """

    name: str
    identity: str
    tokens_per_epoch: int | None

    @abstractmethod
    def sequence(self, position: int) -> PackedSequence:
        """Returns the sequence at a position, `[T]` each.

        Raises:
            DataError: the data of a stream cannot be read, or is not what it was.
        """

    def batch(self, position: int, count: int) -> PackedSequence:
        """Returns the sequences at `position .. position + count - 1`, `[B, T]` each; raises as `sequence` does."""
        return stack([self.sequence(position + row) for row in range(count)])

    def close(self) -> None:
        """Ends threads and lets go of files; nothing is lost."""
        return


class StoredData(TrainingData):
    """The tokens of a folder of shards, repeated in a new order per epoch."""

    def __init__(self, shards: TokenShards, context: int, seed: int) -> None:
        self.name = shards.index.name
        self.tokens_per_epoch = shards.index.num_tokens
        self.identity = hashlib.sha256(f"{shards.index.sha256} {context} {seed}".encode()).hexdigest()
        self._packed = shards.packed(context, seed)

    def sequence(self, position: int) -> PackedSequence:
        return self._packed.sequence(position)


def store(
    source: DataSource[Any],
    encoder: Encoder,
    *,
    budget: int | None,
    seed: int,
    cache_folder: Path,
    workers: int | None,
    on_progress: Callable[[int], None] | None,
) -> TokenShards:
    """Tokenises a source into the cache, or finds it there.

    Args:
        source: the documents.
        encoder: what turns them into tokens.
        budget: tokens; None: all, in file order.
        seed: which documents the budget takes, and their order.
        cache_folder: where shards are kept, in folders named by a hash of source, tokenizer, budget and seed.
        workers: threads that encode.
        on_progress: called with the number of tokens so far.

    Raises:
        DataError: there is no document, one is broken, or the cache is torn or cannot be written.
    """
    order = None if budget is None else seed
    key = digest(["refold-shards-1", *encoder.key(), encoder.has_targets, source.identity, budget, order])
    folder = cache_folder / f"tokens-{key}"

    def make() -> None:
        documents = source.documents(order)
        encoding = Encoding(documents, encoder, budget=budget, workers=workers, on_progress=on_progress)
        with ShardWriter(folder, encoder.dtype, encoder.has_targets, source.name) as writer:
            for document in encoding:
                writer.add(document)
            writer.is_whole_source = encoding.is_whole_source

    return cached(folder, make)


WINDOW_TOKENS = 2**24
"""Tokens of a window, about: 32 MB of a vocabulary below 65,536."""


class StreamedData(TrainingData):
    """A stream cut into windows of a fixed number of sequences, each shuffled by (seed, window).

    The folder has the tokens of the latest two windows, and a small record of where each window so far begins in the
    stream. A window that is asked for and not there is made from its record, so that any position reached before gives
    the same sequence again; one further on is reached by reading on. Several processes may share the folder.
    """

    tokens_per_epoch = None

    def __init__(
        self,
        stream: DocumentStream,
        encoder: Encoder,
        *,
        context: int,
        seed: int,
        cache_folder: Path,
        vocab_size: int | None = None,
        workers: int | None = None,
        window_tokens: int = WINDOW_TOKENS,
    ) -> None:
        """Makes the first window where there is none yet.

        Args:
            stream: the documents.
            encoder: what turns them into tokens.
            context: tokens of a sequence.
            seed: order of sequences within windows.
            cache_folder: where the stream's folder is.
            vocab_size: tokens the model knows, to check; None: no check.
            workers: threads that encode.
            window_tokens: size of a window, which is rounded to whole sequences.

        Raises:
            DataError: the stream is empty or cannot be begun again in the middle, or the cache cannot be written.
            FolderError: a record or the lock beside the folder cannot be written.
        """
        self.name = stream.name
        self._num_sequences = max(1, window_tokens // context)
        self._window_tokens = self._num_sequences * context
        key = ["refold-stream-1", *encoder.key(), encoder.has_targets, stream.identity, self._window_tokens]
        self.identity = hashlib.sha256(f"{digest(key)} {context} {seed}".encode()).hexdigest()
        self._folder = cache_folder / f"stream-{digest(key)}"
        self._stream = stream
        self._encoder = encoder
        self._context = context
        self._seed = seed
        self._vocab_size = vocab_size
        self._workers = workers
        self._feeder: Feeder | None = None
        self._windows: dict[int, PackedSequences] = {}
        if not self._record(0).exists():
            stream.require_repeatable()
            make_folder(self._folder)
            self._window(0)

    def sequence(self, position: int) -> PackedSequence:
        return self._window(position // self._num_sequences).sequence(position)

    def close(self) -> None:
        self._stop_feeding()
        self._windows.clear()

    def _window(self, number: int) -> PackedSequences:
        if number not in self._windows:
            with FolderLock(self._folder, wait=float("inf")):
                shards = self._make(number)
            # Of as many sequences as a window has, the epoch is the window's number: position and order need no more.
            self._windows = {each: self._windows[each] for each in self._windows if each == number - 1}
            self._windows[number] = shards.packed(self._context, self._seed)
        return self._windows[number]

    def _make(self, number: int) -> TokenShards:
        """Opens a window, made where it is not there; the lock is held."""
        folder = self._window_folder(number)
        if not folder.exists():
            first = number
            while first and not self._record(first).exists():
                first -= 1
            for window in range(first, number + 1):
                self._write_window(window)
        shards = TokenShards(folder)
        shards.require_vocabulary(self._vocab_size)
        return shards

    def _write_window(self, number: int) -> None:
        folder = self._window_folder(number)
        # The window before may still be read by another process.
        for other in self._folder.glob("window-*"):
            if other.name not in (folder.name, self._window_folder(number - 1).name):
                shutil.rmtree(other, ignore_errors=True)
        feeder = self._feeder_at(self._read_record(number))
        try:
            with ShardWriter(folder, self._encoder.dtype, self._encoder.has_targets, self.name) as writer:
                for document in feeder.take(self._window_tokens):
                    writer.add(document)
                # Before the window appears, so that where it is, one can go on behind it.
                self._write_record(number + 1, feeder.place)
        except BaseException:
            self._stop_feeding()
            raise

    def _feeder_at(self, place: StreamPlace) -> Feeder:
        if self._feeder is None or self._feeder.place != place:
            self._stop_feeding()
            # A small window is not worth reading far ahead for.
            size = min(BATCH_CHARACTERS, self._window_tokens)
            self._feeder = Feeder(self._stream, self._encoder, place, self._workers, size)
        return self._feeder

    def _stop_feeding(self) -> None:
        if self._feeder is not None:
            self._feeder.close()
            self._feeder = None

    def _window_folder(self, number: int) -> Path:
        return self._folder / f"window-{number:06}"

    def _record(self, number: int) -> Path:
        return self._folder / f"place-{number:06}.json"

    def _read_record(self, number: int) -> StreamPlace:
        path = self._record(number)
        if number == 0 and not path.exists():
            self._write_record(0, StreamPlace())
        try:
            fields: Any = json.loads(path.read_text(encoding="utf-8"))
            return StreamPlace(**fields)
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{path}: a whole record is required ({error}); delete {self._folder} to begin anew"
            ) from error

    def _write_record(self, number: int, place: StreamPlace) -> None:
        write_json(self._record(number), place.to_json())
