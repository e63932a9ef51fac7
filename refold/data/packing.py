"""Packs tokenised documents into training sequences, addressed by one integer position."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from refold.errors import DataError

IGNORED = -100
"""Label of a position that predicts nothing."""


@runtime_checkable
class Slices(Protocol):
    """What slices to an array: an array, or arrays end to end."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice, /) -> np.ndarray: ...


class PackedSequence(NamedTuple):
    """One sequence, or a batch of them stacked in front.

    Attributes:
        input_ids: token ids.
        position_ids: position within the document's piece; 0 starts a document or piece, and nothing looks across it.
        labels: the id each position predicts (shifted already: `labels[t]` is `input_ids[t + 1]`), `IGNORED` for none.
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
    """An endless list of training sequences over one epoch's tokens, repeated in a new order per epoch.

    Documents lie back to back and are cut where a sequence ends; the rest of a cut document begins the next sequence as
    a piece of its own. Position p is sequence `permutation(seed, p // len)[p % len]`, so seeking costs nothing and
    position alone is the state to resume from. The last sequence of the data is filled up with a piece of zeros that
    predicts nothing.
    """

    def __init__(
        self,
        tokens: Slices,
        offsets: np.ndarray,
        sequence_length: int,
        seed: int,
        is_target: Slices | None = None,
    ) -> None:
        """Keeps references to the arrays; copies nothing.

        Args:
            tokens: unsigned `[num_tokens]`, may be memory-mapped or lie in several files.
            offsets: int64 `[num_documents + 1]`, as in `TokenisedDocuments`.
            sequence_length: T, tokens per sequence, at least 2.
            seed: order of sequences.
            is_target: bool `[num_tokens]`, which tokens are to be predicted; None: all.

        Raises:
            DataError: there are no tokens or the length is below 2.
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

        # Where pieces begin, within the sequence: its own start, documents inside it, and the filling.
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
    """Returns sequences of one length as a batch, `[B, T]` each."""
    return PackedSequence(*(torch.stack(column) for column in zip(*sequences, strict=True)))
