"""Text, jsonl and parquet as data sources: lists of blocks in any order."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from refold.data.blocks import Block, D, Field, Form, JsonLinesBlock, MemoryBlock, ParquetBlock, TextBlock, first_line
from refold.errors import DataError
from refold.suggest import did_you_mean

KNOWN_EXTENSIONS = (".txt", ".md", ".py", ".jsonl", ".parquet")
"""What a folder is searched for. A file named by itself may have any other extension, and is then plain text."""

BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class DataSource(Generic[D]):
    """Documents as a list of blocks.

    Attributes:
        blocks: parts that can be read alone; one block is in memory at a time.
        identity: a text that changes when the documents may have changed (names, sizes and modification times of files;
            a digest of texts in memory). Key of caches.
        name: for messages.
    """

    blocks: tuple[Block[D], ...]
    identity: str
    name: str

    def documents(self, seed: int | None = None, epoch: int = 0) -> Iterator[D]:
        """Yields every document that is not empty, once.

        Args:
            seed: blocks, and documents within each block, come in an order drawn from (seed, epoch); None: file order.
            epoch: another epoch is another order.

        Raises:
            DataError: as the blocks do.
        """
        for index in _order(len(self.blocks), seed, epoch, 0):
            documents = self.blocks[index].documents()
            for position in _order(len(documents), seed, epoch, 1 + index):
                if documents[position]:
                    yield documents[position]


def open_data(
    paths: str | Path | Sequence[str | Path],
    *,
    field: str | None = None,
    form: Form = "text",
    block_bytes: int = BLOCK_BYTES,
) -> DataSource[Any]:
    """Opens files and folders as one data source; file contents are read later, block by block.

    Folders are walked in sorted order for `KNOWN_EXTENSIONS`; hidden names are left out.

    Args:
        paths: files (`.jsonl`, `.parquet`, anything else is plain text) and folders.
        field: the jsonl field and parquet column that holds the document; None: `text`, or `messages` for chat.
        form: whether documents are texts or conversations.
        block_bytes: nominal size of a block of text and jsonl. Parquet has its row groups.

    Raises:
        DataError: a path is missing, unreadable, or a folder without known files; everything is empty; a parquet file
            is broken or lacks the column; conversations are asked of plain text.
    """
    given = [paths] if isinstance(paths, str | Path) else paths
    files = [file for path in given for file in _files(Path(path))]
    wanted = Field.of(field, form)
    blocks: list[Block[Any]] = []
    identity: list[Any] = [wanted.name, block_bytes] if form == "text" else [wanted.name, block_bytes, form]
    for path in files:
        try:
            status = path.stat()
            identity.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
            blocks += _blocks(path, status.st_size, wanted, block_bytes)
        except OSError as error:
            raise DataError(f"{path}: a readable file is required ({error.strerror or error})") from error
    name = ", ".join(str(path) for path in given)
    if not blocks:
        raise DataError(f"data: at least one document is required (got none in {name or 'an empty list of paths'})")
    return DataSource(tuple(blocks), json.dumps(identity), name)


def from_documents(documents: Iterable[str], *, name: str = "documents in memory") -> DataSource[str]:
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


def _blocks(path: Path, size: int, field: Field, block_bytes: int) -> Sequence[Block[Any]]:
    if size == 0:
        return []
    if path.suffix == ".parquet":
        return _parquet_blocks(path, field)
    with path.open("rb"):  # permission is checked now and not an hour later
        ranges = [(start, min(start + block_bytes, size)) for start in range(0, size, block_bytes)]
    if path.suffix == ".jsonl":
        return [JsonLinesBlock(path, start, stop, field) for start, stop in ranges]
    if field.form == "chat":
        raise DataError(f"{path}: jsonl or parquet is required for conversations (got plain text)")
    return [TextBlock(path, start, stop) for start, stop in ranges]


def _parquet_blocks(path: Path, field: Field) -> Sequence[Block[Any]]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise DataError(f"{path}: a readable parquet file is required ({first_line(error)})") from error
    schema = file.schema_arrow
    if field.name not in schema.names:
        hint = did_you_mean(field.name, schema.names)
        raise DataError(f"{path}: column '{field.name}' is required (got {schema.names}){hint}")
    kind = schema.field(field.name).type
    if field.form == "text" and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{path}: column '{field.name}' must hold strings (got {kind})")
    if field.form == "chat" and not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise DataError(f"{path}: column '{field.name}' must hold lists of messages (got {kind})")
    column = replace(field, noun="column")
    return [ParquetBlock(path, index, column) for index in range(file.num_row_groups)]


def _order(count: int, seed: int | None, epoch: int, stream: int) -> Iterable[int]:
    if seed is None:
        return range(count)
    return np.random.default_rng([seed, epoch, stream]).permutation(count).tolist()
