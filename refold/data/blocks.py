"""Blocks of documents: rows of a file that are read, shuffled and entered together."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from refold.data.field import Document, Field, OtherContentError
from refold.data.kinds import LONGEST_RECORD
from refold.errors import DataError

D = TypeVar("D", covariant=True)
"""Type of the documents: texts or conversations."""

BROKEN_PARQUET = (pa.ArrowException, OSError, ValueError, KeyError, MemoryError)
"""Errors of reading a parquet file that is truncated or damaged."""

_TEXT_CUT_BYTES = 2**16  # how far past a block's nominal end a text file is searched for a line end


class Block(ABC, Generic[D]):
    """A part of the data that can be read alone."""

    @abstractmethod
    def documents(self) -> Sequence[D]:
        """Returns the documents of this block in file order."""

    def parts(self) -> Iterator[Sequence[D]]:
        """Yields the documents in file order, in lists that fit in memory."""
        yield self.documents()


@dataclass(frozen=True)
class MemoryBlock(Block[D]):
    """A block of documents in memory."""

    texts: tuple[D, ...]

    def documents(self) -> Sequence[D]:
        """Returns the documents in the order given."""
        return self.texts


@dataclass(frozen=True)
class TextBlock(Block[str]):
    """One document of plain text: a file, or a piece of a file that is larger than a block.

    Each end of the byte range moves to the first line end at or after it. If no line ends nearby, it moves to the next
    character.
    """

    path: Path
    start: int
    stop: int

    def documents(self) -> Sequence[str]:
        """Returns a list of one document, or an empty list if the piece is empty.

        Raises:
            DataError: The bytes are not UTF-8, or the file cannot be read.
        """
        offset, raw = _read_range(self.path, self.start, self.stop, _TEXT_CUT_BYTES)
        text = decode(self.path, offset, raw)
        return [text] if text else []


@dataclass(frozen=True)
class JsonLinesBlock(Block[Document]):
    """The complete lines of a jsonl file that begin in the byte range `[start, stop)`; one document per line."""

    path: Path
    start: int
    stop: int
    field: Field

    def documents(self) -> Sequence[Document]:
        """Returns the document in the field of every line that is not blank.

        Raises:
            DataError: A line is not UTF-8, not JSON, not an object, or has no document in its field.
        """
        offset, raw = _read_range(self.path, self.start, self.stop, None)
        texts = []
        begin = 0
        for line in raw.split(b"\n"):
            text = decode(self.path, offset + begin, line)
            if text.strip():
                texts.append(self._document(text, offset + begin))
            begin += len(line) + 1
        return texts

    def _document(self, line: str, offset: int) -> Document:
        try:
            return read_json_row(line, self.field, f"{self.path}: byte {offset}")
        except DataError:
            # The line number is computed only for the message, because it needs all bytes before the line.
            return read_json_row(line, self.field, self._where(offset))

    def _where(self, offset: int) -> str:
        with self.path.open("rb") as file:
            return f"{self.path}:{file.read(offset).count(10) + 1}"


@dataclass(frozen=True)
class ParquetBlock(Block[Document]):
    """One row group of a parquet file; one document per row."""

    path: Path
    row_group: int
    field: Field

    def documents(self) -> Sequence[Document]:
        """Returns the documents in the column.

        Raises:
            DataError: A row has no document or is not UTF-8, or the file cannot be read.
        """
        try:
            file = pq.ParquetFile(self.path)
        except BROKEN_PARQUET as error:
            raise unreadable_group(self.path, self.row_group, error) from error
        return parquet_documents(file, self.row_group, self.field, self.path)


def read_json_row(line: str, field: Field, where: str) -> Document:
    """Returns the document in one row of JSON.

    Raises:
        DataError: The row is not JSON, not an object, or has no document in its field.
    """
    try:
        row = json.loads(line)
    except RecursionError:
        raise DataError(f"{where}: a JSON object is required (got one nested too deep)") from None
    except ValueError as error:
        raise DataError(f"{where}: a JSON object is required (got {line[:40]!r}: {str(error)[:80]})") from error
    if not isinstance(row, dict):
        raise OtherContentError(f"{where}: a JSON object is required (got {type(row).__name__})")
    return field.read_row(row, where)


def check_column(schema: pa.Schema, field: Field, path: Path) -> None:
    """Checks that a parquet file has the field's column and that its type can hold documents.

    Raises:
        DataError: The column is missing or has another type.
    """
    if field.name not in schema.names:
        raise field.missing(schema.names, str(path))
    kind = schema.field(field.name).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    types = pa.types
    if field.form == "text" and not (
        types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    ):
        raise OtherContentError(f"{path}: column '{field.name}' must hold strings (got {kind})")
    if field.form == "chat" and not (types.is_list(kind) or types.is_large_list(kind)):
        raise OtherContentError(f"{path}: column '{field.name}' must hold lists of messages (got {kind})")


def parquet_documents(file: pq.ParquetFile, group: int, field: Field, path: Path) -> list[Document]:
    """Returns the documents of one row group.

    Raises:
        DataError: A row has no document or is not UTF-8, or the file cannot be read.
    """
    try:
        values = file.read_row_group(group, columns=[field.name]).column(field.name).to_pylist()
    except UnicodeDecodeError as error:
        where = f"{path}: row group {group}"
        raise DataError(f"{where}: column '{field.name}' must be UTF-8 text ({error.reason})") from error
    except BROKEN_PARQUET as error:
        raise unreadable_group(path, group, error) from error
    return [field.read(value, f"{path}: row group {group}, row {row}") for row, value in enumerate(values)]


def unreadable_group(path: Path, group: int, error: BaseException) -> DataError:
    """Returns the error for a row group that cannot be read."""
    return DataError(f"{path}: row group {group}: a readable parquet file is required ({first_line(error)})")


def _read_range(path: Path, start: int, stop: int, search: int | None) -> tuple[int, bytes]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            first = _cut(file, start, size, search)
            last = _cut(file, stop, size, search)
            file.seek(first)
            return first, file.read(max(0, last - first))
    except OSError as error:
        raise DataError(f"{path}: a readable file is required ({error.strerror or error})") from error


def _cut(file: BinaryIO, offset: int, size: int, search: int | None) -> int:
    """Returns the first line start at or after `offset`, or the next character if no line starts in `search` bytes."""
    if offset <= 0 or offset >= size:
        return min(max(offset, 0), size)
    file.seek(offset - 1)
    line = file.readline(LONGEST_RECORD + 1 if search is None else search)
    if search is None and len(line) > LONGEST_RECORD:
        raise DataError(
            f"{file.name}: byte {offset}: a line must be at most {LONGEST_RECORD:,} bytes long; cut it into rows"
        )
    if search is None or line.endswith(b"\n"):
        return min(offset - 1 + len(line), size)
    nearby = line[1:5]
    starts = (place for place, byte in enumerate(nearby) if byte & 0xC0 != 0x80)
    return offset + next(starts, len(nearby))


def decode(path: Path, offset: int, raw: bytes) -> str:
    """Decodes bytes that begin at an offset of a file, and drops a byte order mark at offset 0.

    Raises:
        DataError: The bytes are not UTF-8.
    """
    if offset == 0 and raw.startswith(b"\xef\xbb\xbf"):
        raw, offset = raw[3:], 3
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = raw[error.start]
        raise DataError(
            f"{path}: byte {offset + error.start}: text in UTF-8 is required (got byte 0x{bad:02x}); convert it first, "
            f"for instance with `iconv -t UTF-8`"
        ) from error


def first_line(error: BaseException) -> str:
    """Returns the first line of a library's error message, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
