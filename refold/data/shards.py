"""Token shards: flat files of tokens with an index, written as a whole or not at all, read memory-mapped."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refold.data.packing import PackedSequences
from refold.errors import DataError

INDEX_NAME = "index.json"
OFFSETS_NAME = "offsets.bin"
FORMAT = "refold-shards-1"


@dataclass(frozen=True)
class ShardIndex:
    """What a folder of shards holds.

    Attributes:
        dtype: of the tokens, `uint16` or `uint32`, little-endian.
        shards: tokens of every shard.
        num_documents: documents, the cut last one included.
        num_bytes: UTF-8 bytes of the documents.
        largest_token: largest id.
        has_targets: whether some tokens are not to be predicted; then each shard has a byte per token beside it.
        is_whole_source: whether these are all of the source's tokens, not the first of them.
        sha256: of tokens, targets and offsets.
        name: of the source, for messages.
        format: `FORMAT`.
    """

    dtype: str
    shards: tuple[int, ...]
    num_documents: int
    num_bytes: int
    largest_token: int
    has_targets: bool
    is_whole_source: bool
    sha256: str
    name: str
    format: str = FORMAT

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(self.shards)

    def files(self) -> dict[str, int]:
        """Lists the size of every file beside the index."""
        width = np.dtype(self.dtype).itemsize
        sizes = {OFFSETS_NAME: 8 * (self.num_documents + 1)}
        for number, count in enumerate(self.shards):
            sizes[tokens_name(number)] = width * count
            if self.has_targets:
                sizes[targets_name(number)] = count
        return sizes

    def to_json(self) -> str:
        """Returns the index file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"


class ShardedArray:
    """One-dimensional memory-mapped files read end to end as one array."""

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int], dtype: str) -> None:
        self._parts = [
            np.memmap(path, dtype=np.dtype(dtype), mode="r", shape=(size,))
            for path, size in zip(paths, sizes, strict=True)
        ]
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, key: slice) -> np.ndarray:
        start, stop, step = key.indices(len(self))
        assert step == 1
        pieces = []
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self._starts[number + 1]))
            first = int(self._starts[number])
            pieces.append(self._parts[number][start - first : end - first])
            start, number = end, number + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, dtype=self._parts[0].dtype), *pieces])


class TokenShards:
    """An opened folder of shards.

    Attributes:
        index: what it holds.
        tokens: all tokens.
        is_target: bool, which are to be predicted; None: all.
        offsets: int64 `[num_documents + 1]`, where documents begin.
    """

    def __init__(self, folder: Path) -> None:
        """Opens a folder.

        Raises:
            DataError: a file is missing or has another size than the index says, or the index is not one.
        """
        self.index = _read_index(folder)
        try:
            for name, size in self.index.files().items():
                found = (folder / name).stat().st_size
                if found != size:
                    raise _torn(folder, f"{name} has {found} bytes, not {size}")
            numbers = range(len(self.index.shards))
            self.tokens = ShardedArray(
                [folder / tokens_name(number) for number in numbers], self.index.shards, f"<{_code(self.index.dtype)}"
            )
            self.is_target = None
            if self.index.has_targets:
                self.is_target = ShardedArray(
                    [folder / targets_name(number) for number in numbers], self.index.shards, "bool"
                )
            self.offsets = np.memmap(folder / OFFSETS_NAME, dtype="<i8", mode="r")
        except OSError as error:
            raise _torn(folder, f"{Path(error.filename or folder).name}: {error.strerror or error}") from error
        if (self.offsets[0], self.offsets[-1]) != (0, self.index.num_tokens):
            raise _torn(folder, f"{OFFSETS_NAME} does not fit the tokens")

    def packed(self, context: int, seed: int) -> PackedSequences:
        """Returns the tokens as training sequences."""
        return PackedSequences(self.tokens, self.offsets, context, seed, self.is_target)

    def require_vocabulary(self, vocab_size: int | None) -> None:
        """Checks that a model knows all tokens.

        Raises:
            DataError: a token is not below the vocabulary's size.
        """
        largest = self.index.largest_token
        if vocab_size is not None and largest >= vocab_size:
            raise DataError(
                f"{self.index.name}: tokens below the model's {vocab_size} are required (got {largest}); use the "
                f"tokenizer the model was trained with"
            )


def tokens_name(number: int) -> str:
    """Returns the file name of a shard's tokens."""
    return f"tokens-{number:05}.bin"


def targets_name(number: int) -> str:
    """Returns the file name that says which tokens of a shard are to be predicted."""
    return f"targets-{number:05}.bin"


def _read_index(folder: Path) -> ShardIndex:
    try:
        fields: Any = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        index = ShardIndex(**{**fields, "shards": tuple(fields["shards"])})
    except OSError as error:
        raise _torn(folder, f"{INDEX_NAME}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise _torn(folder, f"{INDEX_NAME} is not an index") from error
    if index.format != FORMAT or index.dtype not in ("uint16", "uint32") or not index.shards:
        raise _torn(folder, f"{INDEX_NAME} is not an index of format {FORMAT}")
    return index


def _code(dtype: str) -> str:
    return np.dtype(dtype).str[1:]


def _torn(folder: Path, reason: str) -> DataError:
    return DataError(f"{folder}: a whole token cache is required ({reason}); delete it to make it anew")
