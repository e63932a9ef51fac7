"""Reads text, jsonl and parquet as a list of blocks, so that a shuffled order needs no reading of everything."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from refold.errors import DataError
from refold.suggest import did_you_mean

KNOWN_EXTENSIONS = (".txt", ".md", ".py", ".jsonl", ".parquet")
"""What a folder is searched for. A file named by itself may have any other extension, and is then plain text."""

BLOCK_BYTES = 4 * 2**20
_TEXT_CUT_BYTES = 2**16  # how far past a block's nominal end a text file is searched for a line end


class Block(ABC):
    """A part of the data that can be read alone."""

    @abstractmethod
    def documents(self) -> Sequence[str]:
        """Returns the documents of this block in file order."""


@dataclass(frozen=True)
class MemoryBlock(Block):
    """Documents that are in memory already."""

    texts: tuple[str, ...]

    def documents(self) -> Sequence[str]:
        """Returns the documents in the order given."""
        return self.texts


@dataclass(frozen=True)
class TextBlock(Block):
    """A plain text file, which is one document; of one larger than a block, a piece, which then is one document.

    Pieces are cut after the first line end at or past the nominal byte range's ends, or between two characters where no
    line ends nearby.
    """

    path: Path
    start: int
    stop: int

    def documents(self) -> Sequence[str]:
        """Returns one document, or none where the piece is empty.

        Raises:
            DataError: the bytes are not UTF-8, or the file cannot be read.
        """
        offset, raw = _read_range(self.path, self.start, self.stop, _TEXT_CUT_BYTES)
        text = _decode(self.path, offset, raw)
        return [text] if text else []


@dataclass(frozen=True)
class JsonLinesBlock(Block):
    """The lines of a jsonl file whose first byte lies in `[start, stop)`, each to its end; one document per line."""

    path: Path
    start: int
    stop: int
    field: str

    def documents(self) -> Sequence[str]:
        """Returns the field's text of every line that is not blank.

        Raises:
            DataError: a line is not UTF-8, not JSON, not an object, or lacks the field.
        """
        offset, raw = _read_range(self.path, self.start, self.stop, None)
        texts = []
        begin = 0
        for line in raw.split(b"\n"):
            text = _decode(self.path, offset + begin, line)
            if text.strip():
                texts.append(self._document(text, offset + begin))
            begin += len(line) + 1
        return texts

    def _document(self, line: str, offset: int) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{self._where(offset)}: a JSON object is required (got {line[:40]!r}: {error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{self._where(offset)}: a JSON object is required (got {type(row).__name__})")
        if self.field not in row:
            hint = did_you_mean(self.field, row)
            raise DataError(f"{self._where(offset)}: field '{self.field}' is required (got {sorted(row)}){hint}")
        text = row[self.field]
        if not isinstance(text, str):
            raise DataError(f"{self._where(offset)}: field '{self.field}' must be a string (got {type(text).__name__})")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{self._where(offset)}: field '{self.field}' must be Unicode text (got a lone surrogate)"
            ) from error
        return text

    def _where(self, offset: int) -> str:
        with self.path.open("rb") as file:
            return f"{self.path}:{file.read(offset).count(10) + 1}"


@dataclass(frozen=True)
class ParquetBlock(Block):
    """One row group of a parquet file; one document per row."""

    path: Path
    row_group: int
    column: str

    def documents(self) -> Sequence[str]:
        """Returns the column's texts.

        Raises:
            DataError: a row is null or not UTF-8, or the file cannot be read.
        """
        where = f"{self.path}: row group {self.row_group}"
        try:
            table = pq.ParquetFile(self.path).read_row_group(self.row_group, columns=[self.column])
            texts = table.column(self.column).to_pylist()
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: column '{self.column}' must be UTF-8 text ({error.reason})") from error
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{where}: a readable parquet file is required ({_first_line(error)})") from error
        for row, text in enumerate(texts):
            if text is None:
                raise DataError(f"{where}, row {row}: column '{self.column}' must be a string (got null)")
        return texts


@dataclass(frozen=True)
class DataSource:
    """Documents as a list of blocks.

    Attributes:
        blocks: parts that can be read alone; one block is in memory at a time.
        identity: a text that changes when the documents may have changed (names, sizes and modification times of files;
            a digest of texts in memory). Key of caches.
        name: for messages.
    """

    blocks: tuple[Block, ...]
    identity: str
    name: str

    def documents(self, seed: int | None = None, epoch: int = 0) -> Iterator[str]:
        """Yields every document that is not empty, once.

        Args:
            seed: blocks, and documents within each block, come in an order drawn from (seed, epoch); None: file order.
            epoch: another epoch is another order.

        Raises:
            DataError: as the blocks do.
        """
        for index in _order(len(self.blocks), seed, epoch, 0):
            texts = self.blocks[index].documents()
            for position in _order(len(texts), seed, epoch, 1 + index):
                if texts[position]:
                    yield texts[position]


def open_data(
    paths: str | Path | Sequence[str | Path], *, field: str = "text", block_bytes: int = BLOCK_BYTES
) -> DataSource:
    """Opens files and folders as one data source; file contents are read later, block by block.

    Folders are walked in sorted order for `KNOWN_EXTENSIONS`; hidden names are left out.

    Args:
        paths: files (`.jsonl`, `.parquet`, anything else is plain text) and folders.
        field: the jsonl field and parquet column that holds the text.
        block_bytes: nominal size of a block of text and jsonl. Parquet has its row groups.

    Raises:
        DataError: a path is missing, unreadable, or a folder without known files; everything is empty; a parquet file
            is broken or lacks the column.
    """
    given = [paths] if isinstance(paths, str | Path) else paths
    files = [file for path in given for file in _files(Path(path))]
    blocks: list[Block] = []
    identity = [field, block_bytes]
    for path in files:
        try:
            status = path.stat()
            identity.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
            blocks += _blocks(path, status.st_size, field, block_bytes)
        except OSError as error:
            raise DataError(f"{path}: a readable file is required ({error.strerror or error})") from error
    name = ", ".join(str(path) for path in given)
    if not blocks:
        raise DataError(f"data: at least one document is required (got none in {name or 'an empty list of paths'})")
    return DataSource(tuple(blocks), json.dumps(identity), name)


def from_documents(documents: Iterable[str], *, name: str = "documents in memory") -> DataSource:
    """Makes a data source of texts in memory.

    Raises:
        DataError: there is no text in them.
    """
    texts = tuple(documents)
    if not any(texts):
        raise DataError(f"data: at least one document that is not empty is required (got {len(texts)} in {name})")
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return DataSource((MemoryBlock(texts),), digest.hexdigest(), name)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = []
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [
                Path(folder, name)
                for name in sorted(names)
                if name.endswith(KNOWN_EXTENSIONS) and not name.startswith(".")
            ]
        if not found:
            raise DataError(f"{path}: files ending in {', '.join(KNOWN_EXTENSIONS)} are required (got none)")
        return found
    if not path.exists():
        raise DataError(f"{path}: an existing file or folder is required (got nothing there)")
    return [path]


def _blocks(path: Path, size: int, field: str, block_bytes: int) -> list[Block]:
    if size == 0:
        return []
    if path.suffix == ".parquet":
        return _parquet_blocks(path, field)
    with path.open("rb"):  # permission is checked now and not an hour later
        ranges = [(start, min(start + block_bytes, size)) for start in range(0, size, block_bytes)]
    if path.suffix == ".jsonl":
        return [JsonLinesBlock(path, start, stop, field) for start, stop in ranges]
    return [TextBlock(path, start, stop) for start, stop in ranges]


def _parquet_blocks(path: Path, column: str) -> list[Block]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise DataError(f"{path}: a readable parquet file is required ({_first_line(error)})") from error
    schema = file.schema_arrow
    if column not in schema.names:
        hint = did_you_mean(column, schema.names)
        raise DataError(f"{path}: column '{column}' is required (got {schema.names}){hint}")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{path}: column '{column}' must hold strings (got {kind})")
    return [ParquetBlock(path, index, column) for index in range(file.num_row_groups)]


def _order(count: int, seed: int | None, epoch: int, stream: int) -> Iterable[int]:
    if seed is None:
        return range(count)
    return np.random.default_rng([seed, epoch, stream]).permutation(count).tolist()


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
    """The first line start at or after `offset`; after `search` bytes without one, the next character's first byte."""
    if offset <= 0 or offset >= size:
        return min(max(offset, 0), size)
    file.seek(offset - 1)
    line = file.readline(-1 if search is None else search)
    if search is None or line.endswith(b"\n"):
        return min(offset - 1 + len(line), size)
    nearby = line[1:5]
    starts = (place for place, byte in enumerate(nearby) if byte & 0xC0 != 0x80)
    return offset + next(starts, len(nearby))


def _decode(path: Path, offset: int, raw: bytes) -> str:
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


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
