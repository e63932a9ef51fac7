"""A temporary copy on disk of documents that can be iterated only once, for reading them in any order."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from refold.data.blocks import Block
from refold.data.chat import Conversation
from refold.data.field import Document
from refold.data.readers import BLOCK_BYTES, DataSource
from refold.errors import DataError

SPOOL_BYTES = 2**30
"""Default limit in bytes of a copy."""

logger = logging.getLogger("refold")


@dataclass(frozen=True)
class SpoolBlock(Block[Document]):
    """A byte range of a temporary file without a name, which the system removes with the process."""

    file: BinaryIO
    start: int
    stop: int
    name: str

    def documents(self) -> Sequence[Document]:
        """Returns the documents in their original order."""
        parts, place = [], self.start
        while place < self.stop:
            parts.append(os.pread(self.file.fileno(), self.stop - place, place))
            place += len(parts[-1])
        values = [json.loads(line) for line in b"".join(parts).splitlines()]
        return [each if isinstance(each, str) else Conversation(tuple(each), self.name) for each in values]


def spool(documents: Iterable[Document], name: str, limit: int = SPOOL_BYTES) -> DataSource[Any]:
    """Copies documents into a temporary file until they end or a limit is reached.

    Args:
        documents: The documents; each is read once.
        name: Name for messages.
        limit: Bytes to copy. A line on stderr says if documents are left unread.

    Returns:
        A source whose identity is a hash of the documents, so that a resumed run recognises the same documents.

    Raises:
        DataError: There are no documents, or the temporary folder is full.
    """
    digest = hashlib.sha256()
    starts, size, count = [0], 0, 0
    # The blocks hold the file open; it is closed with the last block.
    file: Any = tempfile.TemporaryFile()  # noqa: SIM115
    iterator = iter(documents)
    is_cut = False
    try:
        for document in iterator:
            if not document:
                continue
            value = document if isinstance(document, str) else document.messages
            line = json.dumps(value).encode() + b"\n"
            file.write(line)
            digest.update(line)
            size, count = size + len(line), count + 1
            if size - starts[-1] >= BLOCK_BYTES:
                starts.append(size)
            if size >= limit:
                is_cut = True
                break
        file.flush()
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"{name}: room for a copy is required in {tempfile.gettempdir()} ({reason}); free space, or set TMPDIR"
        ) from error
    if not count:
        raise DataError(f"data: at least one document that is not empty is required (got none in {name})")
    if is_cut:
        logger.warning("data: the first %s documents (%.1f MB) of %s are read, no more", f"{count:,}", size / 1e6, name)
    stops = [start for start in (*starts[1:], size) if start]
    blocks = tuple(SpoolBlock(file, *span, name) for span in zip(starts, stops, strict=False) if span[0] < span[1])
    return DataSource(blocks, digest.hexdigest(), name)
