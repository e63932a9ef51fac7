"""A contrast: a weighted sum of losses that is above zero if the paper's order holds."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from refold.claims.claim import ClaimArm, Reading
from refold.claims.evidence import Evidence, Samples, combine, estimate
from refold.claims.record import FindingRecord, Outcome, ReadingRecord

if TYPE_CHECKING:
    from refold.claims.workbench import Workbench

BITS = "bits per byte"
LEAST_BITS = 0.002
"""Smallest difference in bits per byte that counts: losses nearer than that are alike for any use."""


@dataclass(frozen=True)
class Contrast:
    """A comparison of losses on text, that holds if the weighted sum of readings is above zero.

    Attributes:
        name: The stated order in words.
        terms: Weights and readings.
        margin: Added to the sum: a loss that is no worse by more than the margin counts as equal.
        least: Smallest effect that counts.
    """

    name: str
    terms: tuple[tuple[float, Reading], ...]
    margin: float = 0.0
    least: float = LEAST_BITS

    @property
    def arms(self) -> tuple[ClaimArm, ...]:
        """The arms of all readings."""
        return tuple(reading.arm for _, reading in self.terms)

    def find(self, bench: "Workbench") -> list[FindingRecord]:
        """Measures the contrast on every text."""
        return [
            judge_samples(self, [(weight, bench.samples(reading, domain)) for weight, reading in self.terms], domain)
            for domain in bench.domains
        ]


def better(arm: ClaimArm, than: ClaimArm, least: float = LEAST_BITS) -> Contrast:
    """Returns the contrast that an arm has a lower loss than another."""
    return Contrast(f"{arm.name} better than {than.name}", ((1.0, Reading(than)), (-1.0, Reading(arm))), least=least)


def as_good(arm: ClaimArm, other: ClaimArm, margin: float) -> Contrast:
    """Returns the contrast that the loss of an arm is no worse than another's by more than a margin."""
    terms = ((1.0, Reading(other)), (-1.0, Reading(arm)))
    return Contrast(f"{arm.name} no worse than {other.name} by {margin:g}", terms, margin=margin, least=0.0)


def judge_samples(contrast: Contrast, terms: list[tuple[float, Samples]], domain: str) -> FindingRecord:
    """Judges a contrast by the samples of its readings on one text."""
    found = combine(terms)
    if not found.amounts.any() and not contrast.margin:
        note = "the models make the same predictions"
    else:
        note = ""
    total = estimate(found)
    effect = Evidence(total.value + contrast.margin, total.error, total.degrees, total.num_seeds, total.num_documents)
    readings = tuple(
        ReadingRecord(
            name=reading.name,
            value=samples.value,
            error=samples.error,
            by_seed=tuple(float(value) for value in samples.by_seed),
        )
        for (_, reading), (_, samples) in zip(contrast.terms, terms, strict=True)
    )
    return finding(contrast.name, domain, BITS, effect, contrast.least, readings, note)


def finding(
    name: str,
    domain: str,
    unit: str,
    effect: Evidence,
    least: float,
    readings: tuple[ReadingRecord, ...] = (),
    note: str = "",
) -> FindingRecord:
    """Returns an effect with its interval and outcome."""
    low, high = effect.interval
    return FindingRecord(
        comparison=name,
        domain=domain,
        unit=unit,
        effect=effect.value,
        low=low,
        high=high,
        error=effect.error,
        detectable=effect.detectable,
        least=least,
        num_seeds=effect.num_seeds,
        num_documents=effect.num_documents,
        outcome=decide(effect, least),
        readings=readings,
        note=note,
    )


def decide(effect: Evidence, least: float) -> Outcome:
    """Decides about an effect that is stated to be above zero.

    An estimate without any variance shows nothing: the compared models are one, or there is a single sample.
    """
    low, high = effect.interval
    if not effect.error:
        return "open"
    if low > 0:
        return "holds"
    return "fails" if high < max(0.0, least) else "open"
