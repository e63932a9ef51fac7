"""Packing of tokenised documents into training sequences, addressed by one integer position."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from refold.errors import DataError

IGNORED = -100
"""Label of a position that has no target."""


@runtime_checkable
class Slices(Protocol):
    """An array, or a concatenation of arrays, that returns an array for a slice."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice, /) -> np.ndarray: ...


class PackedSequence(NamedTuple):
    """One sequence, or a batch of sequences with a leading axis.

    Attributes:
        input_ids: Token ids.
        position_ids: Position within a piece of a document. 0 begins a piece, and attention does not cross this border.
        labels: The id that each position predicts, already shifted (`labels[t]` is `input_ids[t + 1]`), or `IGNORED`.
    """

    input_ids: Int64[Tensor, "*B T"]
    position_ids: Int64[Tensor, "*B T"]
    labels: Int64[Tensor, "*B T"]


@runtime_checkable
class Sequences(Protocol):
    """Training data: packed sequences, addressed by position."""

    def batch(self, position: int, count: int, /) -> PackedSequence:
        """Returns the sequences at `position .. position + count - 1`, `[B, T]` each."""
        ...


class PackedSequences:
    """An endless list of training sequences: the tokens of one epoch, repeated in a new order for each epoch.

    Documents follow each other without gaps. A document that reaches the end of a sequence is cut, and its rest begins
    the next sequence as a new piece. Position p is sequence `permutation(seed, p // len)[p % len]`, so a run resumes
    from the position alone. The last sequence is filled up with zeros without targets.
    """

    def __init__(
        self,
        tokens: Slices,
        offsets: np.ndarray,
        sequence_length: int,
        seed: int,
        is_target: Slices | None = None,
    ) -> None:
        """Keeps references to the arrays without copying them.

        Args:
            tokens: Unsigned `[num_tokens]`, possibly memory-mapped or in several files.
            offsets: Int64 `[num_documents + 1]`, as in `TokenisedDocuments`.
            sequence_length: Tokens per sequence T, at least 2.
            seed: Seed for the order of sequences.
            is_target: Bool `[num_tokens]`, the tokens to predict; None: all.

        Raises:
            DataError: There are no tokens, or the length is below 2.
        """
        if sequence_length < 2:
            raise DataError(f"data: a sequence length of at least 2 tokens is required (got {sequence_length})")
        if not len(tokens):
            raise DataError("data: at least one token is required (got none)")
        assert (offsets[0], offsets[-1]) == (0, len(tokens))
        self.tokens = tokens
        self.offsets = offsets
        self.sequence_length = sequence_length
        self.seed = seed
        self.is_target = is_target
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Sequences per epoch."""
        return -(-len(self.tokens) // self.sequence_length)

    def sequence(self, position: int) -> PackedSequence:
        """Returns the sequence at a position, `[T]` each. Position `len(self)` begins the second epoch."""
        epoch, index = divmod(position, len(self))
        return self._cut(int(self._permutation(epoch)[index]))

    def batch(self, position: int, batch_size: int) -> PackedSequence:
        """Returns the sequences at `position .. position + batch_size - 1`, `[B, T]` each."""
        return stack([self.sequence(position + row) for row in range(batch_size)])

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self)))
        return self._order[1]

    def _cut(self, index: int) -> PackedSequence:
        length = self.sequence_length
        start = index * length
        stop = min(start + length, len(self.tokens))
        input_ids = np.zeros(length, dtype=np.int64)
        input_ids[: stop - start] = self.tokens[start:stop]

        # Begins of pieces within the sequence: the start of the sequence, of each document, and of the filling.
        low, high = np.searchsorted(self.offsets, [start + 1, stop])
        begins = np.unique(np.concatenate([[0], self.offsets[low:high] - start, [stop - start]]))
        begins = begins[begins < length]
        slots = np.arange(length)
        position_ids = slots - begins[np.searchsorted(begins, slots, side="right") - 1]

        labels = np.full(length, IGNORED, dtype=np.int64)
        labels[:-1] = np.where(position_ids[1:] == 0, IGNORED, input_ids[1:])
        if self.is_target is not None:
            labels[: stop - start - 1][~self.is_target[start + 1 : stop]] = IGNORED
        labels[stop - start :] = IGNORED
        return PackedSequence(torch.from_numpy(input_ids), torch.from_numpy(position_ids), torch.from_numpy(labels))


def stack(sequences: Sequence[PackedSequence]) -> PackedSequence:
    """Stacks sequences of equal length into a batch, `[B, T]` each."""
    return PackedSequence(*(torch.stack(column) for column in zip(*sequences, strict=True)))
