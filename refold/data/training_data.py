"""Training sequences addressed by an integer position: stored in shards, made from a stream, or mixed."""

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from refold.checkpoint.atomic_file import write_json
from refold.checkpoint.lock import FolderLock
from refold.data.chat import ChatEncoder
from refold.data.corpus import MOST_BYTES_PER_TOKEN, Data, open_together, weighted_parts
from refold.data.encoder import BATCH_CHARACTERS, Encoder, Encoding, TextEncoder, digest
from refold.data.field import Form
from refold.data.mixture import Interleave
from refold.data.packing import PackedSequence, PackedSequences, stack
from refold.data.readers import DataSource
from refold.data.shards import ShardWriter, TokenShards, cached, make_folder
from refold.data.spool import SPOOL_BYTES
from refold.data.streams import DocumentStream, Feeder, StreamPlace
from refold.errors import DataError


class TrainingData(ABC):
    """An endless list of packed sequences.

    A sequence depends only on the data, the seed, the context and the position. So a run resumes from a position, and
    several processes share the work by reading different positions.

    Attributes:
        name: Name of the data, for messages.
        identity: Digest of everything that the sequences depend on.
        tokens_per_epoch: Tokens after which the data repeats; None: unknown.
    """

    name: str
    identity: str
    tokens_per_epoch: int | None

    @abstractmethod
    def sequence(self, position: int) -> PackedSequence:
        """Returns the sequence at a position, `[T]` each.

        Raises:
            DataError: The data of a stream cannot be read, or has changed.
        """

    def batch(self, position: int, count: int) -> PackedSequence:
        """Returns the sequences at `position .. position + count - 1`, `[B, T]` each, with the errors of `sequence`."""
        return stack([self.sequence(position + row) for row in range(count)])

    def close(self) -> None:
        """Ends threads and closes files; the data can still be read again."""
        return


class StoredData(TrainingData):
    """The tokens of a folder of shards, repeated in a new order for each epoch."""

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
    """Tokenises a source into the cache, or opens the shards that are in the cache already.

    Args:
        source: The documents.
        encoder: Encodes the documents.
        budget: Most tokens; None: all, in file order.
        seed: Seed for the choice and the order of documents.
        cache_folder: Folder of the cache. Shards are in folders named by a hash of source, tokenizer, budget and seed.
        workers: Number of threads that encode.
        on_progress: Called with the number of tokens so far.

    Raises:
        DataError: There is no document, a document is broken, or the cache is incomplete or not writable.
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
"""Approximate tokens of a window: 32 MB for a vocabulary below 65,536."""


class StreamedData(TrainingData):
    """A stream cut into windows of a fixed number of sequences; each window is shuffled by (seed, window).

    The folder has the tokens of the latest two windows, and a small record of the start of every window so far. A
    missing window is made again from its record, so any earlier position gives the same sequence again. A later
    position is reached by reading on. Several processes may share the folder.
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
        """Makes the first window if it does not exist.

        Args:
            stream: The documents.
            encoder: Encodes the documents.
            context: Tokens of a sequence.
            seed: Seed for the order of sequences within windows.
            cache_folder: Folder in which the stream's folder is made.
            vocab_size: Size of the model's vocabulary; None: no check.
            workers: Number of threads that encode.
            window_tokens: Tokens of a window, rounded to whole sequences.

        Raises:
            DataError: The stream is empty or cannot continue from a saved state, or the cache cannot be written.
            FolderError: A record or the lock beside the folder cannot be written.
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
            # An epoch has as many sequences as a window, so the number of the window is the epoch of its positions.
            self._windows = {each: self._windows[each] for each in self._windows if each == number - 1}
            self._windows[number] = shards.packed(self._context, self._seed)
        return self._windows[number]

    def _make(self, number: int) -> TokenShards:
        """Opens a window and makes it first if it does not exist; the caller holds the lock."""
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
        # Another process may still read the previous window.
        for other in self._folder.glob("window-*"):
            if other.name not in (folder.name, self._window_folder(number - 1).name):
                shutil.rmtree(other, ignore_errors=True)
        feeder = self._feeder_at(self._read_record(number))
        try:
            with ShardWriter(folder, self._encoder.dtype, self._encoder.has_targets, self.name) as writer:
                for document in feeder.take(self._window_tokens):
                    writer.add(document)
                # Written before the window gets its name, so that every existing window has the record of the next one.
                self._write_record(number + 1, feeder.place)
        except BaseException:
            self._stop_feeding()
            raise

    def _feeder_at(self, place: StreamPlace) -> Feeder:
        if self._feeder is None or self._feeder.place != place:
            self._stop_feeding()
            # For a small window, reading far ahead would cost more than the window.
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


class MixedData(TrainingData):
    """A mixture of training data; each part has its own epochs."""

    tokens_per_epoch = None

    def __init__(self, parts: Sequence[TrainingData], interleave: Interleave) -> None:
        """Keeps the parts, which `close` closes.

        Args:
            parts: Training data of one context length.
            interleave: The part of each position.
        """
        self.parts = tuple(parts)
        self.name = ", ".join(part.name for part in parts)
        self._interleave = interleave
        shares = " ".join(str(share) for share in interleave.shares)
        digests = " ".join(part.identity for part in parts)
        self.identity = hashlib.sha256(f"{shares} {digests}".encode()).hexdigest()

    def sequence(self, position: int) -> PackedSequence:
        part, place = self._interleave.locate(position)
        return self.parts[part].sequence(place)

    def close(self) -> None:
        for part in self.parts:
            part.close()


def open_training_data(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    seed: int,
    budget: int | None,
    cache_folder: Path,
    form: Form = "text",
    vocab_size: int | None = None,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    window_tokens: int = WINDOW_TOKENS,
) -> TrainingData:
    """Opens training data: tokenises a source into the cache (or opens it from the cache), or begins a stream.

    A list with weights (`PATH=0.7`) is a mixture; a list without weights is one source. A stream is read while training
    goes on. It can be a part of a mixture, but not of a source. Several processes may open one cache at the same time:
    one tokenises, the others wait.

    Args:
        data: The data to read.
        tokenizer: Tokenizer of the model to train.
        context: Tokens of a sequence.
        seed: Seed for the order of documents and sequences.
        budget: Tokens that training reads at most; only so many are tokenised. None: all, in file order.
        cache_folder: Folder of the token cache.
        form: `text`, or `chat` for lists of messages.
        vocab_size: Size of the model's vocabulary; None: no check.
        workers: Number of threads that encode; None: see `default_workers`.
        on_progress: Called with the number of tokens so far while a source is tokenised.
        window_tokens: Tokens of a stream that are shuffled together.

    Raises:
        DataError: Data is missing, empty, broken or of another form; a weight is not above 0; the tokenizer has no chat
            template, or has tokens outside the model's vocabulary; the cache is incomplete or not writable.
    """
    if context < 2:
        raise DataError(f"data: a sequence length of at least 2 tokens is required (got {context})")
    if budget is not None and budget < 1:
        raise DataError(f"data: a budget of at least 1 token is required (got {budget})")
    encoder: Encoder = ChatEncoder(tokenizer) if form == "chat" else TextEncoder(tokenizer)

    def open_part(part: DataSource | DocumentStream, budget: int | None) -> TrainingData:
        if isinstance(part, DocumentStream):
            return StreamedData(
                part,
                encoder,
                context=context,
                seed=seed,
                cache_folder=cache_folder,
                vocab_size=vocab_size,
                workers=workers,
                # Windows are not larger than the budget, because the rest would be encoded and never read.
                window_tokens=window_tokens if budget is None else max(context, min(window_tokens, budget)),
            )
        shards = store(
            part,
            encoder,
            budget=budget,
            seed=seed,
            cache_folder=cache_folder,
            workers=workers,
            on_progress=on_progress,
        )
        shards.require_vocabulary(vocab_size)
        return StoredData(shards, context, seed)

    limit = SPOOL_BYTES if budget is None else min(SPOOL_BYTES, MOST_BYTES_PER_TOKEN * budget + 2**20)
    parts = weighted_parts(data, form)
    if len(parts) == 1:
        return open_part(open_together(parts[0][0], form, limit), budget)
    interleave = Interleave([weight for _, weight in parts])
    budgets: list[int | None] = [None] * len(parts)
    if budget is not None:
        num_sequences = -(-budget // context)
        budgets = [context * interleave.most(number, num_sequences) for number in range(len(parts))]
    sources = [open_together(part, form, limit) for part, _ in parts]
    return MixedData([open_part(*each) for each in zip(sources, budgets, strict=True)], interleave)
