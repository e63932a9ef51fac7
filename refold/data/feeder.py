"""The tokens of a stream, epoch after epoch, from any place noted before."""

import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from refold.data.encoder import EncodedDocument, Encoder
from refold.data.encoding import Encoding
from refold.data.field import Document
from refold.data.streams import Cursor, DocumentStream
from refold.errors import DataError

_NOTE_EVERY = 64


@dataclass(frozen=True)
class Place:
    """A place in a stream's tokens, all that is needed to go on there.

    Attributes:
        epoch: how often the stream has ended.
        document: number of the document in its epoch, from 0.
        tokens: how many of its tokens lie before the place; they may be all.
        check: CRC-32 of all its tokens, None at the very beginning.
        noted_document: a document at or before it, where `state` is.
        state: the cursor's state there, None at the beginning of an epoch.
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
    """Where a cursor stood before it gave a document."""

    epoch: int
    document: int
    state: dict[str, Any] | None


class Feeder:
    """Gives a stream's tokens in order, any number at a time.

    Documents are read and encoded ahead by several threads; `place` is where the tokens given so far end.
    """

    def __init__(
        self, stream: DocumentStream, encoder: Encoder, place: Place, workers: int | None, batch_characters: int
    ) -> None:
        """Reads nothing yet.

        Args:
            stream: the documents.
            encoder: what turns them into tokens.
            place: where to begin.
            workers: threads that encode.
            batch_characters: about how much each of them takes at a time.
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
        """Yields documents, the first and last ones cut, of together exactly so many tokens.

        Raises:
            DataError: the stream is empty, or is not the one the place was noted in.
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
        """Returns what is left of the next document that has tokens left, and moves the place to its first token."""
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
            self.place = Place(epoch, number, skip, check, note.document, note.state)
            _, rest = _split(document, skip)
            if len(rest.ids):
                return rest

    def _moved(self, count: int) -> Place:
        return replace(self.place, tokens=self.place.tokens + count)

    def _note(self, epoch: int, number: int) -> _Note:
        """Returns the last note at or before a document, and forgets those before it."""
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
