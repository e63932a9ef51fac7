"""Reading of data files that can be read only from the beginning: compressed files, CSV, and JSON arrays."""

import csv
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from refold.data.blocks import BROKEN_PARQUET, Block, check_column, decode, parquet_documents, read_json_row
from refold.data.field import Document, Field, OtherContentError
from refold.data.kinds import LONGEST_RECORD, ByteStream, FileKind, open_stream, unreadable
from refold.errors import DataError

READ_BYTES = 2**20
_TEXT_CUT_BYTES = 2**16  # how far past a piece's nominal end a text is searched for a line end
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class SequentialBlock(Block[Document]):
    """A whole file, read in parts; documents are shuffled within a part, because parts must be read in order.

    Attributes:
        path: The file.
        kind: Layout and compression of the file.
        field: The field of a row's document.
        piece_bytes: Size of the pieces of a plain text.
        part_bytes: Approximate characters of the documents of a part.
    """

    path: Path
    kind: FileKind
    field: Field
    piece_bytes: int
    part_bytes: int

    def documents(self) -> Sequence[Document]:
        """Returns all documents of the file."""
        return [document for part in self.parts() for document in part]

    def parts(self) -> Iterator[Sequence[Document]]:
        """Yields the documents in file order, in lists of about `part_bytes` characters.

        Raises:
            DataError: The file is truncated or damaged, or a row has no document.
        """
        part: list[Document] = []
        size = 0
        with open_stream(self.path, self.kind.compression) as stream:
            for document in _READERS[self.kind.layout](self, stream):
                part.append(document)
                size += len(document) if isinstance(document, str) else _characters(document)
                if size >= self.part_bytes:
                    yield part
                    part, size = [], 0
        if part:
            yield part

    def peek(self) -> None:
        """Reads the first document, so that a missing field is reported when the file is opened."""
        with open_stream(self.path, self.kind.compression) as stream:
            next(iter(_READERS[self.kind.layout](self, stream)), None)


def _characters(document: Any) -> int:
    return sum(len(message.get("content") or "") for message in document.messages)


def _read_texts(block: SequentialBlock, stream: ByteStream) -> Iterator[Document]:
    offset = 0
    carried = b""
    while True:
        raw = carried + stream.read(block.piece_bytes)
        if raw and not raw.endswith(b"\n"):
            raw += stream.readline(_TEXT_CUT_BYTES)
        if not raw:
            return
        # If the cut is inside a character, its first bytes are carried to the next piece.
        end = len(raw) if raw.endswith(b"\n") else _whole_characters(raw)
        raw, carried = raw[:end], raw[end:]
        if not raw:
            raw, carried = carried, b""
        if text := decode(block.path, offset, raw):
            yield text
        offset += len(raw)


def _whole_characters(raw: bytes) -> int:
    """Returns the start of an incomplete character at the end of some UTF-8, or the length if it is complete."""
    for back in range(1, min(4, len(raw)) + 1):
        byte = raw[-back]
        if byte & 0xC0 != 0x80:
            need = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(raw) - back if need > back else len(raw)
    return len(raw)


def _read_lines(block: SequentialBlock, stream: ByteStream) -> Iterator[Document]:
    offset = 0
    number = 0
    while line := stream.readline(LONGEST_RECORD + 1):
        number += 1
        if len(line) > LONGEST_RECORD:
            raise _too_long(f"{block.path}:{number}", "line")
        text = decode(block.path, offset, line.removesuffix(b"\n"))
        offset += len(line)
        if text.strip():
            yield read_json_row(text, block.field, f"{block.path}:{number}")


def _read_values(block: SequentialBlock, stream: ByteStream) -> Iterator[Document]:
    """Reads the rows of one array, or a sequence of rows, with one row in memory at a time."""
    characters = _Characters(block.path, stream)
    is_array = characters.skip_space() == "["
    if is_array:
        characters.position += 1
    number = 0
    while begin := characters.skip_space():
        where = f"{block.path}: row {number}"
        if is_array and begin == "]" and not number:
            break
        row = characters.value(where)
        if not isinstance(row, dict):
            raise OtherContentError(f"{where}: a JSON object is required (got {type(row).__name__})")
        yield block.field.read_row(row, where)
        number += 1
        if is_array:
            begin = characters.skip_space()
            if begin == "]":
                break
            if begin != ",":
                got = characters.shown() if begin else "the end of the file"
                raise DataError(f"{where}: a comma or the end of the array is required behind it (got {got})")
            characters.position += 1
    if is_array:
        if not begin:
            raise DataError(f"{block.path}: row {number}: a JSON object is required (got the end of the file)")
        characters.position += 1
        if characters.skip_space():
            raise DataError(f"{block.path}: nothing is allowed behind the array (got {characters.shown()})")


class _Characters:
    """A moving window over the characters of a stream; characters before `position` are dropped."""

    def __init__(self, path: Path, stream: ByteStream) -> None:
        self.position = 0
        self._path, self._stream = path, stream
        self._text = ""
        self._offset = 0
        self._carried = b""
        self._decoder = json.JSONDecoder()

    def skip_space(self) -> str:
        """Skips white space and returns the next character, or an empty string at the end."""
        while True:
            self.position = _SPACE.match(self._text, self.position).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self.position < len(self._text):
                return self._text[self.position]
            if not self._more(READ_BYTES):
                return ""

    def value(self, where: str) -> object:
        """Returns the JSON value at the position and moves the position behind it."""
        wanted = READ_BYTES
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self.position)
            except RecursionError:
                raise DataError(f"{where}: a JSON object is required (got one nested too deep)") from None
            except ValueError as error:
                # The amount doubles, so that a long value is parsed a logarithmic number of times.
                if len(self._text) - self.position > LONGEST_RECORD:
                    raise _too_long(where, "row") from None
                if self._is_cut(error) and self._more(wanted):
                    wanted *= 2
                    continue
                raise DataError(f"{where}: a JSON object is required (got {self.shown()}: {str(error)[:80]})") from None
            self.position = end
            return value

    def shown(self) -> str:
        return repr(self._text[self.position : self.position + 40])

    def _is_cut(self, error: ValueError) -> bool:
        """Returns whether a parse error may come from missing characters, because it is near the end of the text."""
        if isinstance(error, json.JSONDecodeError):
            return "Unterminated" in error.msg or error.pos > len(self._text) - 16
        return False

    def _more(self, count: int) -> bool:
        read = self._stream.read(count)
        raw = self._carried + read
        if not raw:
            return False
        is_last = len(read) < count
        end = len(raw) if is_last else _whole_characters(raw)
        text = decode(self._path, self._offset, raw[:end])
        self._offset += end
        self._carried = raw[end:]
        self._text = self._text[self.position :] + text
        self.position = 0
        return bool(text) or not is_last


def _read_csv(block: SequentialBlock, stream: ByteStream) -> Iterator[Document]:
    field = block.field
    delimiter = block.kind.delimiter
    # The limit belongs to the whole interpreter, so it is raised and never lowered.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_RECORD))
    rows = (row for row in csv.reader(_lines(block.path, stream), delimiter=delimiter, strict=True) if row)
    number = 0
    try:
        names = [name.strip() for name in next(rows, ())]
        if names and field.name not in names:
            raise field.missing(names, str(block.path))
        for number, row in enumerate(rows, start=1):
            place = names.index(field.name)
            if not place < len(row) <= len(names):
                raise DataError(
                    f"{block.path}: row {number}: {len(names)} fields are required (got {len(row)}); quote fields that "
                    f"hold {delimiter!r}"
                )
            yield field.read(row[place], f"{block.path}: row {number}")
    except csv.Error as error:
        raise DataError(f"{block.path}: row {number + 1}: a row of CSV is required ({error})") from error


def _lines(path: Path, stream: ByteStream) -> Iterator[str]:
    offset = 0
    while line := stream.readline(LONGEST_RECORD + 1):
        if len(line) > LONGEST_RECORD:
            raise _too_long(f"{path}: byte {offset}", "line")
        text = decode(path, offset, line)
        offset += len(line)
        # The parser expects a separate line for a line that ends in a carriage return alone.
        yield from io.StringIO(text, newline="")


def _read_parquet(block: SequentialBlock, stream: ByteStream) -> Iterator[Document]:
    # A parquet reader begins at the end of the file, so the file is decompressed to disk first.
    with tempfile.TemporaryFile() as file:
        while raw := stream.read(READ_BYTES):
            file.write(raw)
        file.seek(0)
        try:
            opened = pq.ParquetFile(file)
            schema = opened.schema_arrow
        except BROKEN_PARQUET as error:
            raise unreadable(block.path, error) from error
        check_column(schema, block.field, block.path)
        for group in range(opened.num_row_groups):
            yield from parquet_documents(opened, group, block.field, block.path)


def _too_long(where: str, noun: str) -> DataError:
    return DataError(f"{where}: a {noun} must be at most {LONGEST_RECORD:,} bytes long; cut it into several documents")


_READERS: dict[str, Callable[[SequentialBlock, ByteStream], Iterator[Document]]] = {
    "text": _read_texts,
    "json_lines": _read_lines,
    "json": _read_values,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
