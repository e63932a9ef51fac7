"""Evidence for a difference: its value, its interval over seeds and documents, and the smallest one it could find."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refold.evaluation.document_sums import ratio_error

CONFIDENCE = 0.95
"""Confidence of the two-sided intervals."""
POWER = 0.8
"""Probability with which the minimum detectable effect is found."""


@dataclass(frozen=True)
class Samples:
    """Amounts of one reading for every seed and document, such as bits of a model's predictions.

    Attributes:
        amounts: `[num_seeds, num_documents]` in float64; one seed for a model that no seed changes.
        sizes: `[num_documents]`, such as bytes.
    """

    amounts: np.ndarray
    sizes: np.ndarray

    @property
    def value(self) -> float:
        """The ratio of sums, averaged over seeds."""
        return float(self.amounts.sum(1).mean() / self.sizes.sum())

    @property
    def by_seed(self) -> np.ndarray:
        """The ratio of sums of each seed."""
        return self.amounts.sum(1) / self.sizes.sum()

    @property
    def error(self) -> float:
        """Standard error of `value` over seeds and documents."""
        return estimate(self).error


@dataclass(frozen=True)
class Evidence:
    """A value with the variance of its sampled seeds and documents.

    Attributes:
        value: The estimate.
        error: Its standard error; both sources of variance are added.
        degrees: Degrees of freedom of the error (Welch and Satterthwaite).
        num_seeds: Number of seeds; 1: no seed changes the value.
        num_documents: Number of documents; 0: the value is not a sum over documents.
    """

    value: float
    error: float
    degrees: float
    num_seeds: int
    num_documents: int

    @property
    def interval(self) -> tuple[float, float]:
        """The two-sided interval of `CONFIDENCE`, by Student's t."""
        reach = student_quantile(0.5 + CONFIDENCE / 2, self.degrees) * self.error
        return self.value - reach, self.value + reach

    @property
    def detectable(self) -> float:
        """The minimum detectable effect: the true effect whose interval excludes zero with probability `POWER`.

        `(t(0.975) + t(0.8)) * error`, with the error of this sample.
        """
        wanted = student_quantile(0.5 + CONFIDENCE / 2, self.degrees) + student_quantile(POWER, self.degrees)
        return wanted * self.error


def combine(terms: Sequence[tuple[float, Samples]]) -> Samples:
    """Returns the weighted sum of readings on the same documents, seeds paired.

    A reading with one seed is the same for every seed of the others.
    """
    num_seeds = max(len(samples.amounts) for _, samples in terms)
    total = np.zeros((num_seeds, len(terms[0][1].sizes)))
    for weight, samples in terms:
        assert len(samples.amounts) in (1, num_seeds), "readings of one claim have the same seeds"
        assert np.array_equal(samples.sizes, terms[0][1].sizes), "readings of one claim have the same documents"
        total += weight * samples.amounts
    return Samples(total, terms[0][1].sizes)


def estimate(samples: Samples) -> Evidence:
    """Estimates a ratio of sums from seeds and documents.

    The variance is that of the mean over seeds, plus the delta-method variance over documents of the amounts averaged
    over seeds. What a seed does to single documents is in both, so the error is rather too large than too small.
    """
    num_seeds, num_documents = samples.amounts.shape
    of_documents = (ratio_error(samples.amounts.mean(0), samples.sizes) or 0.0) ** 2
    of_seeds = float(samples.by_seed.var(ddof=1)) / num_seeds if num_seeds > 1 else 0.0
    return _evidence(samples.value, of_seeds, num_seeds, of_documents, num_documents)


def estimate_by_seed(values: Sequence[float]) -> Evidence:
    """Estimates a mean from one value for each seed."""
    found = np.asarray(values, dtype=np.float64)
    of_seeds = float(found.var(ddof=1)) / len(found) if len(found) > 1 else 0.0
    return _evidence(float(found.mean()), of_seeds, len(found), 0.0, 0)


def _evidence(value: float, of_seeds: float, num_seeds: int, of_documents: float, num_documents: int) -> Evidence:
    total = of_seeds + of_documents
    parts = [
        part**2 / (count - 1) for part, count in ((of_seeds, num_seeds), (of_documents, num_documents)) if count > 1
    ]
    spread = sum(parts)
    degrees = total**2 / spread if spread > 0 else 1.0
    return Evidence(value, math.sqrt(total), degrees, num_seeds, num_documents)


def student_quantile(probability: float, degrees: float) -> float:
    """Returns the quantile of Student's t, for any positive number of degrees of freedom.

    With `t = sqrt(degrees) tan(angle)` the density is proportional to `cos(angle)^(degrees - 1)`, which is summed.

    Args:
        probability: Above 0.5 and below 1.
        degrees: Degrees of freedom, at least 1.
    """
    # Beyond so many degrees the quantile differs from the normal one by less than 1e-5.
    degrees = min(max(degrees, 1.0), 1e5)
    angles = np.linspace(0.0, math.pi / 2, 4_001)
    # Most of the mass of many degrees lies near zero, where the grid must be dense.
    angles = angles if degrees < 50 else np.linspace(0.0, min(math.pi / 2, 12 / math.sqrt(degrees)), 4_001)
    density = np.cos(angles).clip(0.0) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = float(np.interp((2 * probability - 1) * mass[-1], mass, angles))
    return math.sqrt(degrees) * math.tan(angle)
