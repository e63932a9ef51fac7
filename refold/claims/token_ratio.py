"""The number of times that fewer tokens lead one arm to the final loss of another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refold.claims.claim import ClaimArm
from refold.claims.contrast import finding
from refold.claims.evidence import Evidence, estimate_by_seed
from refold.claims.record import FindingRecord, ReadingRecord

if TYPE_CHECKING:
    from refold.claims.workbench import Workbench

LossCurve = Sequence[tuple[int, float]]
"""Pairs of training tokens and loss, in the order of training."""


@dataclass(frozen=True)
class TokenRatio:
    """A comparison of tokens, that holds if `fast` needs fewer of them for the final loss of `slow`.

    Attributes:
        fast: An arm whose validation loss is measured during training.
        slow: Another, trained on the same tokens.
        least: Smallest ratio that counts.
    """

    fast: ClaimArm
    slow: ClaimArm
    least: float = 1.0

    @property
    def arms(self) -> tuple[ClaimArm, ...]:
        """Both arms."""
        return self.fast, self.slow

    def find(self, bench: "Workbench") -> list[FindingRecord]:
        """Measures the ratio of every seed, on validation text; the effect is its binary logarithm."""
        pairs = list(zip(bench.curves(self.fast), bench.curves(self.slow), strict=True))
        effect = estimate_by_seed([math.log2(token_ratio(fast, slow)) for fast, slow in pairs])
        ratio = 2**effect.value
        bounds = [is_bound(fast, slow) for fast, slow in pairs]
        readings = tuple(
            ReadingRecord(
                name=f"{arm.name}, at the end",
                value=sum(ends) / len(ends),
                error=_error(ends),
                by_seed=tuple(ends),
            )
            for arm, ends in zip(self.arms, _ends(pairs), strict=True)
        )
        found = finding(
            f"{self.fast.name} needs fewer tokens than {self.slow.name}",
            "validation",
            "doublings of tokens",
            effect,
            math.log2(self.least),
            readings,
            f"{'at least ' if any(bounds) else ''}{ratio:.1f} times fewer tokens",
        )
        if all(bounds) and len(bounds) > 1 and ratio > self.least:
            # Every seed was there at its first measurement: a bound, whose spread says nothing.
            found = found.model_copy(update={"outcome": "holds"})
        return [found]


def _error(values: Sequence[float]) -> float:
    found: Evidence = estimate_by_seed(values)
    return found.error


def _ends(pairs: Sequence[tuple[LossCurve, LossCurve]]) -> tuple[list[float], list[float]]:
    return [fast[-1][1] for fast, _ in pairs], [slow[-1][1] for _, slow in pairs]


def token_ratio(fast: LossCurve, slow: LossCurve) -> float:
    """Returns the tokens of a whole training divided by those that the better arm needed for the worse one's end.

    The ratio is below 1 if `slow` ends at the lower loss.
    """
    if fast[-1][1] > slow[-1][1]:
        return 1 / token_ratio(slow, fast)
    return slow[-1][0] / tokens_to_reach(slow[-1][1], fast)


def is_bound(fast: LossCurve, slow: LossCurve) -> bool:
    """Tells whether the first measurement already reached the other's final loss, so that the ratio is a bound."""
    return fast[0][1] <= slow[-1][1]


def tokens_to_reach(goal: float, curve: LossCurve) -> float:
    """Returns the tokens after which a curve reaches a loss, interpolated between measurements.

    Args:
        goal: A loss that the curve reaches.
        curve: The curve; before its first measurement nothing is known, so its tokens are the fewest returned.
    """
    before = curve[0]
    for tokens, value in curve:
        if value <= goal:
            if before == (tokens, value):
                return float(tokens)
            share = (before[1] - goal) / (before[1] - value)
            return before[0] + share * (tokens - before[0])
        before = (tokens, value)
    raise AssertionError("the curve must reach the goal")
