"""Weighted mixtures of training data, interleaved so that every prefix has the asked shares."""

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from refold.data.packing import PackedSequence
from refold.data.readers import DataSource
from refold.data.training_data import TrainingData
from refold.errors import DataError

MAX_PERIOD = 2**16


class Interleave:
    """Deals positions to sources in proportion to their weights.

    Of the first n positions a source has n times its share, give or take less than one (the quota condition of Balinski
    and Young 1975, met by earliest deadline as in Steiner and Yeomans 1993): its j-th position (from 0) may be among
    the first n as soon as `n * share > j`, and must be once `n * share >= j + 1`. The order repeats after the smallest
    n at which all quotas are whole numbers, so a position is looked up.

    Attributes:
        shares: of every source, adding up to 1. Weights whose common denominator is above 65,536 are rounded to it.
    """

    def __init__(self, weights: Sequence[float | int]) -> None:
        """Makes one period of the order.

        Args:
            weights: in any unit, of every source.

        Raises:
            DataError: a weight is not a positive number, or too small beside the others.
        """
        for weight in weights:
            if not (math.isfinite(weight) and weight > 0):
                raise DataError(f"data: weights above 0 are required (got {weight:g}); leave out what is not wanted")
        counts = _counts(weights)
        self._period = sum(counts)
        self.shares = tuple(Fraction(count, self._period) for count in counts)
        self._sources = _deal(counts)
        self._ranks = np.zeros(self._period, dtype=np.int64)
        for source in range(len(counts)):
            places = self._sources == source
            self._ranks[places] = np.arange(counts[source])
        self._counts = counts

    def locate(self, position: int) -> tuple[int, int]:
        """Returns which source a position reads, and how many positions before it that source had."""
        period, place = divmod(position, self._period)
        source = int(self._sources[place])
        return source, period * self._counts[source] + int(self._ranks[place])

    def among(self, source: int, num_positions: int) -> int:
        """Returns how many of the first so many positions a source has."""
        periods, rest = divmod(num_positions, self._period)
        return periods * self._counts[source] + int((self._sources[:rest] == source).sum())

    def most(self, source: int, num_positions: int) -> int:
        """Returns a bound on the positions a source has among the first so many."""
        return min(num_positions, math.ceil(num_positions * self.shares[source]) + 1)


def _counts(weights: Sequence[float | int]) -> list[int]:
    """Returns the positions of each source in one period."""
    # As written: 0.1 is a tenth, not the nearest binary fraction.
    exact = [Fraction(repr(float(weight))) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    counts = [math.floor(share * MAX_PERIOD) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: counts[source] - shares[source] * MAX_PERIOD)
    for source in by_remainder[: MAX_PERIOD - sum(counts)]:
        counts[source] += 1
    if 0 in counts:
        weight = weights[counts.index(0)]
        raise DataError(f"data: weights of at least 1/{MAX_PERIOD} of their sum are required (got {weight:g})")
    return counts


def _deal(counts: Sequence[int]) -> np.ndarray:
    """Returns the source of every position of one period."""
    period = sum(counts)
    waiting = [(0, source, 0) for source in range(len(counts))]  # first place, source, how many it had
    ready: list[tuple[int, int, int]] = []  # last place, source, how many it had
    order = np.empty(period, dtype=np.int32)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, source, had = heapq.heappop(waiting)
            # The had + 1st is due when the quota reaches had + 1.
            heapq.heappush(ready, (-(-(had + 1) * period // counts[source]), source, had))
        deadline, source, had = heapq.heappop(ready)
        assert place < deadline
        order[place] = source
        if had + 1 < counts[source]:
            # The next may come once the quota has passed had + 1.
            heapq.heappush(waiting, ((had + 1) * period // counts[source], source, had + 1))
    return order


@dataclass(frozen=True)
class Mixture:
    """Data given with weights.

    Attributes:
        parts: each with its weight, in any unit: `Mixture([("books.parquet", 0.7), ("code.jsonl", 0.3)])`. A part is
            anything that can be data by itself.
    """

    parts: Sequence[tuple[Any, float | int]]


@dataclass(frozen=True)
class MixedSource(DataSource[Any]):
    """Several opened sources, taken to be text of a kind each. As a whole it has the documents of all of them.

    Attributes:
        parts: the sources.
        weights: of the parts where they are mixed; None: documents count as many times as there are of them.
    """

    parts: tuple[DataSource[Any], ...] = ()
    weights: tuple[float, ...] | None = None

    @classmethod
    def of_whole(cls, whole: DataSource[Any], parts: Sequence[DataSource[Any]]) -> "MixedSource":
        """Makes one of a source whose parts are known."""
        return cls(whole.blocks, whole.identity, whole.name, whole.files, tuple(parts))

    @classmethod
    def weighted(cls, parts: Sequence[DataSource[Any]], weights: Sequence[float]) -> "MixedSource":
        """Makes one of parts with weights."""
        whole = DataSource.join(parts)
        interleave = Interleave(weights)
        shares = [f"{float(share):.0%} {part.name}" for share, part in zip(interleave.shares, parts, strict=True)]
        identity = repr([whole.identity, *map(str, interleave.shares)])
        return cls(whole.blocks, identity, ", ".join(shares), whole.files, tuple(parts), tuple(weights))


ONE_KIND = {
    "calibration": "On SmolLM2-135M, low rank at 74% of the bytes loses 0.61 nats per token on books, which it was "
    "calibrated on, and 1.83 on encyclopedia text; half books, half documentation: 0.83 and 1.31",
    "healing": "On SmolLM2-135M, low rank at 74% of the bytes, calibrated and healed on books, loses 0.27 nats per "
    "token on books and 1.35 on encyclopedia text",
}
"""By use of the text, the price of one kind of it: `docs/how-to/data.md` has the table."""


def describe_one_kind(source: DataSource[Any] | str, use: str) -> str | None:
    """Returns the line for text of one kind, by a key of `ONE_KIND`; None where several things were named."""
    if isinstance(source, MixedSource):
        return None
    name = source if isinstance(source, str) else source.name
    return (
        f"{use} text comes from {name} alone: if that is one kind of text, others lose more. {ONE_KIND[use]}. "
        f"Give several with weights: A=0.5 and B=0.5"
    )


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
