"""Several sources read in fixed proportions."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refold.data.interleave import Interleave
from refold.data.packing import PackedSequence
from refold.data.training_data import TrainingData


@dataclass(frozen=True)
class Mixture:
    """Data given with weights.

    Attributes:
        parts: each with its weight, in any unit: `Mixture([("books.parquet", 0.7), ("code.jsonl", 0.3)])`. A part is
            anything that can be data by itself.
    """

    parts: Sequence[tuple[Any, float | int]]


class MixedData(TrainingData):
    """Training data whose sequences come from several others, each at its own pace and with its own epochs."""

    tokens_per_epoch = None

    def __init__(self, parts: Sequence[TrainingData], interleave: Interleave) -> None:
        """Takes the parts over.

        Args:
            parts: of one context length.
            interleave: which part each position reads.
        """
        self.parts = tuple(parts)
        self.name = ", ".join(part.name for part in parts)
        self._interleave = interleave
        shares = " ".join(str(share) for share in interleave.shares)
        digests = " ".join(part.identity for part in parts)
        self.identity = hashlib.sha256(f"{shares} {digests}".encode()).hexdigest()

    def sequence(self, position: int) -> PackedSequence:
        part, place = self._interleave.locate(position)
        return self.parts[part].sequence(place)

    def close(self) -> None:
        for part in self.parts:
            part.close()
