"""Weighted mixtures of data, interleaved so that every prefix has the requested shares."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from refold.data.readers import DataSource
from refold.errors import DataError

MAX_PERIOD = 2**16


class Interleave:
    """An order of positions that gives each source its share of every prefix.

    Among the first n positions, the number of a source's positions differs from `n * share` by less than one (the quota
    condition of Balinski and Young 1975, met by earliest deadline first as in Steiner and Yeomans 1993). So its j-th
    position (from 0) may be among the first n if `n * share > j`, and must be if `n * share >= j + 1`. The order
    repeats after the smallest n for which all quotas are whole numbers; this period is stored as a table.

    Attributes:
        shares: Share of every source; the sum is 1. Weights with a common denominator above 65,536 are rounded to it.
    """

    def __init__(self, weights: Sequence[float | int]) -> None:
        """Computes one period of the order.

        Args:
            weights: Weight of every source, in any unit.

        Raises:
            DataError: A weight is not a positive number, or is too small compared with the others.
        """
        for weight in weights:
            if not (math.isfinite(weight) and weight > 0):
                raise DataError(f"data: weights above 0 are required (got {weight:g}); drop a part that is not wanted")
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
        """Returns the source of a position, and the number of this source's positions before it."""
        period, place = divmod(position, self._period)
        source = int(self._sources[place])
        return source, period * self._counts[source] + int(self._ranks[place])

    def among(self, source: int, num_positions: int) -> int:
        """Returns the number of a source's positions among the first `num_positions`."""
        periods, rest = divmod(num_positions, self._period)
        return periods * self._counts[source] + int((self._sources[:rest] == source).sum())

    def most(self, source: int, num_positions: int) -> int:
        """Returns an upper bound for the number of a source's positions among the first `num_positions`."""
        return min(num_positions, math.ceil(num_positions * self.shares[source]) + 1)


def _counts(weights: Sequence[float | int]) -> list[int]:
    """Returns the number of positions of each source in one period."""
    # From the decimal form: 0.1 is a tenth, not the nearest binary fraction.
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
    waiting = [(0, source, 0) for source in range(len(counts))]  # first possible place, source, its count so far
    ready: list[tuple[int, int, int]] = []  # deadline, source, its count so far
    order = np.empty(period, dtype=np.int32)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, source, had = heapq.heappop(waiting)
            # The next position must come before the quota reaches had + 1.
            heapq.heappush(ready, (-(-(had + 1) * period // counts[source]), source, had))
        deadline, source, had = heapq.heappop(ready)
        assert place < deadline
        order[place] = source
        if had + 1 < counts[source]:
            # The position after it may come when the quota exceeds had + 1.
            heapq.heappush(waiting, ((had + 1) * period // counts[source], source, had + 1))
    return order


@dataclass(frozen=True)
class Mixture:
    """Several parts of data with weights.

    Attributes:
        parts: Parts with their weights, in any unit: `Mixture([("books.parquet", 0.7), ("code.jsonl", 0.3)])`. A part
            is data in any form that refold accepts.
    """

    parts: Sequence[tuple[Any, float | int]]


@dataclass(frozen=True)
class MixedSource(DataSource[Any]):
    """A source with the documents of several sources, each counted as one kind of text.

    Attributes:
        parts: The sources.
        weights: Weights of the parts in a mixture; None: every document counts once.
    """

    parts: tuple[DataSource[Any], ...] = ()
    weights: tuple[float, ...] | None = None

    @classmethod
    def of_whole(cls, whole: DataSource[Any], parts: Sequence[DataSource[Any]]) -> "MixedSource":
        """Returns a mixed source without weights, from one source and its parts."""
        return cls(whole.blocks, whole.identity, whole.name, whole.files, tuple(parts))

    @classmethod
    def weighted(cls, parts: Sequence[DataSource[Any]], weights: Sequence[float]) -> "MixedSource":
        """Returns a mixed source of parts with weights."""
        whole = DataSource.join(parts)
        interleave = Interleave(weights)
        shares = [f"{float(share):.0%} {part.name}" for share, part in zip(interleave.shares, parts, strict=True)]
        identity = repr([whole.identity, *map(str, interleave.shares)])
        return cls(whole.blocks, identity, ", ".join(shares), whole.files, tuple(parts), tuple(weights))


ONE_KIND = {
    "calibration": "On SmolLM2-135M, low rank at 80% of the bytes loses 0.09 bits per byte on books, which it was "
    "calibrated on, and 0.65 on documentation; half books, half documentation: 0.14 and 0.17",
    "healing": "Healing SmolLM2-135M at 80% of the bytes on books and documentation lowered its loss on both to 0.02 "
    "bits per byte, from 0.11 and 0.16; on stories, which it did not read, from 0.17 to 0.13 alone",
}
"""Measured loss on other kinds of text, for each use of the text; the table is in `docs/how-to/data.md`."""


OTHER_KINDS = (
    "SmolLM2-135M, low rank at 80% of the bytes: 0.09 bits per byte on books as in calibration, 0.65 on documentation"
)
"""The same loss in short, for evaluations."""


def describe_one_kind(source: DataSource[Any] | str, use: str) -> str | None:
    """Returns the note about text that may be of one kind, or None for a source of several parts.

    Args:
        source: The source, or its name.
        use: A key of `ONE_KIND`.
    """
    if isinstance(source, MixedSource):
        return None
    name = source if isinstance(source, str) else source.name
    return (
        f"{use} text comes from {name} alone: if that is one kind of text, others lose more. {ONE_KIND[use]}. "
        f"Give several with weights: A=0.5 and B=0.5"
    )
