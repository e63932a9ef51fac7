"""Data sources of files, folders and texts in memory: lists of blocks that can be read in any order."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

import numpy as np
import pyarrow.parquet as pq

from refold.data.blocks import (
    BROKEN_PARQUET,
    Block,
    D,
    JsonLinesBlock,
    MemoryBlock,
    ParquetBlock,
    TextBlock,
    check_column,
    first_line,
)
from refold.data.chat import Conversation
from refold.data.field import Document, Field, Form
from refold.data.folder_walk import walk
from refold.data.kinds import FileKind, recognise, require_file
from refold.data.sequential import SequentialBlock
from refold.errors import DataError

BLOCK_BYTES = 4 * 2**20
PART_BLOCKS = 16
"""Size in blocks of the parts in which a file that can be read only from its beginning is shuffled."""

logger = logging.getLogger("refold")


@dataclass(frozen=True)
class DataSource(Generic[D]):
    """A list of blocks of documents.

    Attributes:
        blocks: Blocks that can be read separately; one block is in memory at a time.
        identity: A text that changes if the documents may have changed: names, sizes and modification times of files,
            or a digest of texts in memory. It is part of cache keys.
        name: Name for messages.
        files: The files of the source, if it has files.
    """

    blocks: tuple[Block[D], ...]
    identity: str
    name: str
    files: tuple[Path, ...] = ()

    @classmethod
    def join(cls, sources: "Sequence[DataSource[Any]]") -> "DataSource[Any]":
        """Concatenates sources."""
        return DataSource(
            tuple(block for source in sources for block in source.blocks),
            repr([source.identity for source in sources]),
            ", ".join(source.name for source in sources),
            tuple(file for source in sources for file in source.files),
        )

    def documents(self, seed: int | None = None, epoch: int = 0) -> Iterator[D]:
        """Yields every document that is not empty once.

        Args:
            seed: Seed, with the epoch, for the order of blocks and of documents within a part of a block; None: file
                order.
            epoch: Number of the epoch; each epoch has another order.

        Raises:
            DataError: A block cannot be read.
        """
        for index in _order(len(self.blocks), seed, epoch, 0):
            for number, documents in enumerate(self.blocks[index].parts()):
                for position in _order(len(documents), seed, epoch, 1 + index, *([number] if number else [])):
                    if documents[position]:
                        yield documents[position]


def open_data(
    paths: str | Path | Sequence[str | Path],
    *,
    field: str | None = None,
    form: Form = "text",
    block_bytes: int = BLOCK_BYTES,
) -> DataSource[Any]:
    """Opens files and folders as one data source; documents are read later, block by block.

    The kinds of files are in `refold.data.kinds`. Folders are walked in sorted order. If a folder has files that are
    skipped or data of several kinds, a line on stderr lists them.

    Args:
        paths: Files and folders.
        field: JSON field, or CSV, parquet or data set column, of the document; None: `text`, or `messages` for chat.
        form: Whether documents are texts or conversations.
        block_bytes: Nominal size of a block of text and JSON lines. A block of parquet is a row group.

    Raises:
        DataError: A path is missing, unreadable, of a refused kind, or a folder without data; all files are empty; a
            file is broken, or its first row does not have the field; plain text or CSV is opened as conversations.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    return open_paths(given, field=field, form=form, block_bytes=block_bytes)[0]


def open_paths(
    paths: Sequence[str | Path], *, field: str | None = None, form: Form = "text", block_bytes: int = BLOCK_BYTES
) -> tuple[DataSource[Any], tuple[DataSource[Any], ...]]:
    """Opens paths as one source and each that is not empty as another; see `open_data`."""
    wanted = Field.of(field, form)
    head: list[Any] = [wanted.name, block_bytes] if form == "text" else [wanted.name, block_bytes, form]
    parts: list[DataSource[Any]] = []
    entries: list[Any] = []
    for path in map(Path, paths):
        folder = walk(path, wanted)
        if folder.says_more:
            logger.warning("data: %s", folder.line)
        opened = [_open_file(file, wanted, block_bytes) for file in folder.files]
        blocks = tuple(block for _, blocks in opened for block in blocks)
        own = [entry for entry, _ in opened]
        entries += own
        parts.append(DataSource(blocks, json.dumps([*head, *own]), str(path), folder.files))
    name = ", ".join(part.name for part in parts)
    blocks = tuple(block for part in parts for block in part.blocks)
    if not blocks:
        raise DataError(f"data: at least one document is required (got none in {name or 'an empty list of paths'})")
    files = tuple(file for part in parts for file in part.files)
    whole = DataSource(blocks, json.dumps([*head, *entries]), name, files)
    return whole, tuple(part for part in parts if part.blocks)


def _open_file(path: Path, field: Field, block_bytes: int) -> tuple[list[Any], Sequence[Block[Any]]]:
    """Returns the entry of a file for the identity, and the blocks of the file."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: a readable file is required ({error.strerror or error})") from error
    entry: list[Any] = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    if not status.st_size:
        require_file(path)
        return entry, ()
    kind = recognise(path, field)
    # Kinds that older versions recognised by the ending alone are not part of the entry, so old caches stay valid.
    if kind.reads_from_start or kind.layout != {".parquet": "parquet", ".jsonl": "json_lines"}.get(path.suffix, "text"):
        entry += [str(kind), kind.delimiter]
    return entry, _blocks(path, status.st_size, kind, field, block_bytes)


def from_documents(documents: Iterable[Document], *, name: str = "documents in memory") -> DataSource[Any]:
    """Returns a data source of texts, or of checked conversations, in memory.

    Args:
        documents: The documents; they are read once.
        name: Name for messages and results.

    Raises:
        DataError: All documents are empty, or one is not a string of Unicode text.
    """
    texts = tuple(
        each if isinstance(each, Conversation) else Field("text").read_value(each, f"{name}: document {number}")
        for number, each in enumerate(documents)
    )
    if not any(texts):
        raise DataError(f"data: at least one document that is not empty is required (got {len(texts)} in {name})")
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode() if isinstance(text, str) else json.dumps(text.messages).encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return DataSource((MemoryBlock(texts),), digest.hexdigest(), name)


def _blocks(path: Path, size: int, kind: FileKind, field: Field, block_bytes: int) -> Sequence[Block[Any]]:
    if field.form == "chat" and kind.layout in ("text", "csv"):
        raise DataError(f"{path}: JSON lines or parquet is required for conversations (got {kind})")
    if kind.layout in ("csv", "parquet"):
        field = replace(field, noun="column")
    if kind.reads_from_start:
        block = SequentialBlock(path, kind, field, block_bytes, PART_BLOCKS * block_bytes)
        block.peek()
        return [block]
    if kind.layout == "parquet":
        return _parquet_blocks(path, field)
    make = JsonLinesBlock if kind.layout == "json_lines" else None
    ranges = [(start, min(start + block_bytes, size)) for start in range(0, size, block_bytes)]
    return [make(path, *each, field) if make else TextBlock(path, *each) for each in ranges]


def _parquet_blocks(path: Path, field: Field) -> Sequence[Block[Any]]:
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except BROKEN_PARQUET as error:
        raise DataError(f"{path}: a readable parquet file is required ({first_line(error)})") from error
    check_column(schema, field, path)
    return [ParquetBlock(path, index, field) for index in range(file.num_row_groups)]


def _order(count: int, seed: int | None, epoch: int, *stream: int) -> Iterable[int]:
    if seed is None:
        return range(count)
    return np.random.default_rng([seed, epoch, *stream]).permutation(count).tolist()
