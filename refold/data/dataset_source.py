"""A `datasets.Dataset` as a data source."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from refold.data.blocks import Block
from refold.data.field import Document, Field
from refold.data.readers import BLOCK_BYTES, DataSource
from refold.errors import DataError
from refold.suggest import did_you_mean


@dataclass(frozen=True)
class DatasetBlock(Block[Document]):
    """Rows of a `datasets.Dataset`; one document per row."""

    dataset: Any
    start: int
    stop: int
    field: Field
    name: str

    def documents(self) -> Sequence[Document]:
        """Returns the column's documents.

        Raises:
            DataError: a row holds no document.
        """
        values = self.dataset[self.start : self.stop][self.field.name]
        return [self.field.read(value, f"{self.name}: row {self.start + row}") for row, value in enumerate(values)]


def open_dataset(dataset: Any, field: Field, name: str, block_bytes: int = BLOCK_BYTES) -> DataSource[Document]:
    """Makes a data source of a `datasets.Dataset`.

    Args:
        dataset: one split, memory-mapped or in memory.
        field: which column holds the document.
        name: for messages.
        block_bytes: nominal size of a block.

    Raises:
        DataError: the column is missing, or there are no rows.
    """
    column = replace(field, noun="column")
    if column.name not in dataset.column_names:
        hint = did_you_mean(column.name, dataset.column_names)
        raise DataError(f"{name}: column '{column.name}' is required (got {dataset.column_names}){hint}")
    if not len(dataset):
        raise DataError(f"data: at least one document is required (got none in {name})")
    rows = max(1, math.ceil(len(dataset) * block_bytes / max(1, dataset.data.nbytes)))
    blocks = tuple(
        DatasetBlock(dataset, start, min(start + rows, len(dataset)), column, name)
        for start in range(0, len(dataset), rows)
    )
    # A fingerprint changes with every transformation and with the files a data set was loaded from.
    return DataSource(blocks, f"{dataset._fingerprint} {column.name} {column.form} {rows}", name)
