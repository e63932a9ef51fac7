"""What healing trains on: an endless list of sequences addressed by one integer."""

from abc import ABC, abstractmethod

from refold.data.packing import PackedSequence, stack


class TrainingData(ABC):
    """An endless list of packed sequences.

    The sequence at a position depends on data, seed, context and position alone. So a position is all there is to
    resume from, and several processes share the work by reading different positions of one list.

    Attributes:
        name: of the data, for messages.
        identity: digest of everything the sequences depend on.
        tokens_per_epoch: tokens after which sequences come again; None where that is not known.
    """

    name: str
    identity: str
    tokens_per_epoch: int | None

    @abstractmethod
    def sequence(self, position: int) -> PackedSequence:
        """Returns the sequence at a position, `[T]` each.

        Raises:
            DataError: the data of a stream cannot be read, or is not what it was.
        """

    def batch(self, position: int, count: int) -> PackedSequence:
        """Returns the sequences at `position .. position + count - 1`, `[B, T]` each; raises as `sequence` does."""
        return stack([self.sequence(position + row) for row in range(count)])

    def close(self) -> None:
        """Ends threads and lets go of files; nothing is lost."""
        return
