"""Documents that come one after another and are too many to store: iterables and streamed data sets."""

import copy
import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from refold.data.blocks import first_line
from refold.data.field import Document, Field
from refold.errors import DataError

_SAMPLE = 8


class Cursor(ABC):
    """A place in a stream that moves on document by document."""

    @abstractmethod
    def next(self) -> Document | None:
        """Returns the next document that is not empty, None at the end of the stream."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Returns what `DocumentStream.start` needs to go on here, as JSON."""


class DocumentStream(ABC):
    """Documents in a fixed order that can be begun again at any place reached before.

    Attributes:
        name: for messages.
        identity: digest that changes when the documents may have changed.
    """

    name: str
    identity: str

    @abstractmethod
    def start(self, state: dict[str, Any] | None) -> Cursor:
        """Begins at a cursor's state, or at the first document. Cursors begun before are no longer used."""

    def require_repeatable(self) -> None:
        """Checks on a few documents that the stream can be begun again in the middle.

        Raises:
            DataError: other documents come then, as from a shuffle buffer or a generator; or there are none.
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
    """Any Python object that can be iterated again from its beginning; going on means skipping what came before."""

    def __init__(self, items: Iterable[Any], field: Field, name: str = "documents in memory") -> None:
        """Reads a few documents, which stand for all in the identity.

        Args:
            items: texts; conversations as lists of messages; or rows that have the field.
            field: what documents are.
            name: for messages.

        Raises:
            DataError: it can be iterated only once, or the first documents are not of the form.
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
    """A `datasets.IterableDataset`, which goes on by its own `state_dict`."""

    def __init__(self, dataset: Any, field: Field, name: str, identity: str | None = None) -> None:
        """Takes a copy of the data set.

        Args:
            dataset: of `datasets` with `streaming=True`, or made from a generator.
            field: which column holds the document.
            name: for messages.
            identity: what stands for the documents; None: a few of them do.

        Raises:
            DataError: the first rows have no such column, or are not of the form.
        """
        # A data set keeps the state of its latest iteration.
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
            where = f"{self._name}: item {self._num_items}"
            self._num_items += 1
            is_row = isinstance(item, Mapping)
            if document := self._field.read_row(item, where) if is_row else self._field.read(item, where):
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


def _sample_digest(stream: DocumentStream, field: Field) -> str:
    cursor = stream.start(None)
    sample = [cursor.next() for _ in range(_SAMPLE)]
    texts = [each if isinstance(each, str | None) else each.messages for each in sample]
    return hashlib.sha256(json.dumps([field.name, field.form, texts], default=str).encode()).hexdigest()
