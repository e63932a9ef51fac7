"""Streams of documents, and the feeder that encodes them into tokens."""

import copy
import hashlib
import itertools
import json
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from refold.data.blocks import first_line
from refold.data.encoder import EncodedDocument, Encoder, Encoding
from refold.data.field import Document, Field
from refold.errors import DataError

_SAMPLE = 8


class Cursor(ABC):
    """A position in a stream that advances document by document."""

    @abstractmethod
    def next(self) -> Document | None:
        """Returns the next document that is not empty, or None at the end of the stream."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Returns the state for `DocumentStream.start` to continue at this position, as JSON."""


class DocumentStream(ABC):
    """Documents in a fixed order that can be read again from any position reached before.

    Attributes:
        name: Name for messages.
        identity: Digest that changes if the documents may have changed.
    """

    name: str
    identity: str

    @abstractmethod
    def start(self, state: dict[str, Any] | None) -> Cursor:
        """Returns a cursor at a saved state, or at the first document; earlier cursors become invalid."""

    def require_repeatable(self) -> None:
        """Checks on a few documents that the stream gives the same documents again from a saved state.

        Raises:
            DataError: The documents differ, as with a shuffle buffer or a generator; or the stream is empty.
        """
        cursor = self.start(None)
        if cursor.next() is None:
            raise DataError(f"data: at least one document that is not empty is required (got none in {self.name})")
        state = cursor.state()
        following = [cursor.next() for _ in range(_SAMPLE)]
        again = self.start(json.loads(json.dumps(state)))
        if following != [again.next() for _ in range(_SAMPLE)]:
            raise DataError(
                f"{self.name}: a stream that can go on where it stopped is required (begun again behind its first "
                f"document it gives others, as shuffled or random ones do); give it in a fixed order: training shuffles"
            )


class IterableStream(DocumentStream):
    """A Python object that can be iterated several times; a cursor continues by skipping the earlier items."""

    def __init__(self, items: Iterable[Any], field: Field, name: str = "documents in memory") -> None:
        """Reads the first documents for the identity.

        Args:
            items: Texts, lists of messages, or rows with the field.
            field: Field and form of the documents.
            name: Name for messages.

        Raises:
            DataError: The object can be iterated only once, or the first documents are not of the form.
        """
        if isinstance(items, Iterator):
            raise DataError(
                f"{name}: data that can be iterated again is required (got a {type(items).__name__}, which is used up "
                f"by one pass); give an object whose __iter__ begins anew"
            )
        self._items = items
        self._field = field
        self.name = name
        self.identity = _sample_digest(self, field)

    def start(self, state: dict[str, Any] | None) -> Cursor:
        return _IterableCursor(self._items, self._field, self.name, 0 if state is None else state["items"])


class DatasetStream(DocumentStream):
    """A `datasets.IterableDataset`; its own `state_dict` is the state of a cursor."""

    def __init__(self, dataset: Any, field: Field, name: str, identity: str | None = None) -> None:
        """Copies the data set.

        Args:
            dataset: A data set loaded with `streaming=True`, or made from a generator.
            field: Column and form of the documents.
            name: Name for messages.
            identity: Identity of the documents; None: a digest of the first documents.

        Raises:
            DataError: The first rows do not have the column, or are not of the form.
        """
        # A data set holds the state of its latest iteration.
        self._dataset = copy.deepcopy(dataset)
        self._first = copy.deepcopy(self._dataset.state_dict())
        self._field = field
        self.name = name
        self.identity = _sample_digest(self, field) if identity is None else identity

    def start(self, state: dict[str, Any] | None) -> Cursor:
        self._dataset.load_state_dict(copy.deepcopy(self._first if state is None else state["dataset"]))
        return _DatasetCursor(self._dataset, self._field, self.name, 0 if state is None else state["items"])


class _IterableCursor(Cursor):
    def __init__(self, items: Iterable[Any], field: Field, name: str, num_items: int) -> None:
        self._iterator = iter(items)
        self._field = field
        self._name = name
        self._num_items = sum(1 for _ in itertools.islice(self._iterator, num_items))

    def next(self) -> Document | None:
        for item in self._iterator:
            self._num_items += 1
            if document := _read_item(item, self._field, f"{self._name}: item {self._num_items - 1}"):
                return document
        return None

    def state(self) -> dict[str, Any]:
        return {"items": self._num_items}


class _DatasetCursor(_IterableCursor):
    def __init__(self, dataset: Any, field: Field, name: str, num_items: int) -> None:
        super().__init__(dataset, field, name, 0)
        self._dataset = dataset
        self._num_items = num_items

    def next(self) -> Document | None:
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HTTPError

        try:
            return super().next()
        except (DatasetsError, HTTPError, pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self._name}: a stream that can be read is required ({first_line(error)}); run again to go on"
            ) from error

    def state(self) -> dict[str, Any]:
        try:
            state = json.loads(json.dumps(self._dataset.state_dict()))
        except TypeError as error:
            raise DataError(f"{self._name}: a stream whose state is JSON is required ({error})") from error
        return {"items": self._num_items, "dataset": state}


def read_items(items: Iterable[Any], field: Field, name: str) -> Iterator[Document]:
    """Yields the documents of texts, rows or lists of messages, empty ones included.

    Raises:
        DataError: An item is of another type.
    """
    for number, item in enumerate(items):
        yield _read_item(item, field, f"{name}: item {number}")


def _read_item(item: Any, field: Field, where: str) -> Document:
    return field.read_row(item, where) if isinstance(item, Mapping) else field.read(item, where)


def _sample_digest(stream: DocumentStream, field: Field) -> str:
    cursor = stream.start(None)
    sample = [cursor.next() for _ in range(_SAMPLE)]
    texts = [each if isinstance(each, str | None) else each.messages for each in sample]
    return hashlib.sha256(json.dumps([field.name, field.form, texts], default=str).encode()).hexdigest()


_NOTE_EVERY = 64


@dataclass(frozen=True)
class StreamPlace:
    """A position in the tokens of a stream, with the state to continue from it.

    Attributes:
        epoch: Number of complete passes over the stream.
        document: Number of the document in its epoch, from 0.
        tokens: Number of tokens of this document before the position; possibly all of them.
        check: CRC-32 of all tokens of this document; None at the beginning of the stream.
        noted_document: Number of the document, at or before `document`, at which `state` was saved.
        state: State of the cursor at `noted_document`; None at the beginning of an epoch.
    """

    epoch: int = 0
    document: int = 0
    tokens: int = 0
    check: int | None = None
    noted_document: int = 0
    state: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the place as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Note:
    """The state of a cursor before it returned a document."""

    epoch: int
    document: int
    state: dict[str, Any] | None


class Feeder:
    """Yields the tokens of a stream in order, in portions of any size.

    Several threads read and encode documents ahead. `place` is the position after the last token that was yielded.
    """

    def __init__(
        self, stream: DocumentStream, encoder: Encoder, place: StreamPlace, workers: int | None, batch_characters: int
    ) -> None:
        """Keeps the arguments; reading begins with `take`.

        Args:
            stream: The documents.
            encoder: Encodes the documents.
            place: The position to begin at.
            workers: Number of threads that encode.
            batch_characters: Approximate characters of a batch of one thread.
        """
        self.place = place
        self._stream = stream
        self._notes: deque[_Note] = deque()
        self._numbers: deque[tuple[int, int]] = deque()  # epoch and number of every document being encoded
        self._encoded = iter(
            Encoding(self._documents(), encoder, budget=None, workers=workers, batch_characters=batch_characters)
        )
        self._left: EncodedDocument | None = None

    def take(self, count: int) -> Iterator[EncodedDocument]:
        """Yields documents with exactly `count` tokens in total; the first and the last one may be cut.

        Raises:
            DataError: The stream is empty, or differs from the stream in which the place was saved.
        """
        while count:
            if self._left is None:
                self._left = self._next()
            part, rest = _split(self._left, count)
            self.place = self._moved(len(part.ids))
            self._left = rest if len(rest.ids) else None
            count -= len(part.ids)
            yield part

    def close(self) -> None:
        """Ends the threads."""
        self._encoded.close()

    def _next(self) -> EncodedDocument:
        """Returns the unread part of the next document that has one, and moves the place to its first token."""
        first_epoch = self.place.epoch
        while True:
            document = next(self._encoded)
            epoch, number = self._numbers.popleft()
            if epoch > first_epoch + 1:
                raise DataError(f"{self._stream.name}: documents with at least one token are required (got none)")
            check = zlib.crc32(document.ids.astype("<u4").tobytes())
            skip = 0
            if (epoch, number) == (self.place.epoch, self.place.document) and self.place.check is not None:
                if check != self.place.check:
                    raise self._changed(epoch, number)
                skip = self.place.tokens
            note = self._note(epoch, number)
            self.place = StreamPlace(epoch, number, skip, check, note.document, note.state)
            _, rest = _split(document, skip)
            if len(rest.ids):
                return rest

    def _moved(self, count: int) -> StreamPlace:
        return replace(self.place, tokens=self.place.tokens + count)

    def _note(self, epoch: int, number: int) -> _Note:
        """Returns the last note at or before a document, and drops earlier notes."""
        while len(self._notes) > 1 and (self._notes[1].epoch, self._notes[1].document) <= (epoch, number):
            self._notes.popleft()
        return self._notes[0]

    def _documents(self) -> Iterator[Document]:
        epoch, number = self.place.epoch, self.place.noted_document
        cursor = self._stream.start(self.place.state)
        while number < self.place.document:
            self._note_now(cursor, epoch, number)
            if cursor.next() is None:
                raise self._changed(epoch, number)
            number += 1
        while True:
            self._note_now(cursor, epoch, number)
            document = cursor.next()
            if document is not None:
                self._numbers.append((epoch, number))
                yield document
                number += 1
            elif number == 0:
                raise DataError(
                    f"data: at least one document that is not empty is required (got none in {self._stream.name})"
                )
            else:
                epoch, number = epoch + 1, 0
                cursor = self._stream.start(None)

    def _note_now(self, cursor: Cursor, epoch: int, number: int) -> None:
        if number % _NOTE_EVERY == 0 or not self._notes:
            self._notes.append(_Note(epoch, number, cursor.state() if number else None))

    def _changed(self, epoch: int, number: int) -> DataError:
        return DataError(
            f"{self._stream.name}: the stream that training began with is required (document {number} of pass "
            f"{epoch + 1} is another one or missing); give the same data, or begin anew"
        )


def _split(document: EncodedDocument, count: int) -> tuple[EncodedDocument, EncodedDocument]:
    targets = document.is_target
    share = document.num_bytes * min(count, len(document.ids)) // max(1, len(document.ids))
    return (
        EncodedDocument(document.ids[:count], None if targets is None else targets[:count], share),
        EncodedDocument(document.ids[count:], None if targets is None else targets[count:], document.num_bytes - share),
    )
