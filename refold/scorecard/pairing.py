"""Differences between two models, paired by document or by item where both have the same ones."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from refold.evaluation.document_sums import ratio_error
from refold.scorecard.significance import exact_sign_test, two_sided

LEAST_PAIRED = 0.5
"""Least share of the units of the smaller sample that must have a partner for a paired difference."""

Amounts = Float[np.ndarray, "units"]


@dataclass(frozen=True)
class Units:
    """Documents or items of a figure that is a ratio of sums, such as bits per byte or a share of right answers.

    Attributes:
        names: A name of each unit, such as the hash of its text; a name may come back.
        amounts: An amount of each unit, such as bits, in float64.
        sizes: A size of each unit, such as bytes, in float64; units of size 0 do not count.
    """

    names: tuple[str, ...]
    amounts: Amounts
    sizes: Amounts

    @property
    def are_answers(self) -> bool:
        """Whether every unit is one answer, right or wrong."""
        return bool((self.sizes == 1).all() and np.isin(self.amounts, (0, 1)).all())

    def counted(self) -> "Units":
        """Returns the units whose size is above 0."""
        return self.take(np.flatnonzero(self.sizes > 0))

    def take(self, places: Sequence[int] | np.ndarray) -> "Units":
        """Returns the units at some places."""
        index = np.asarray(places, dtype=np.int64)
        return Units(tuple(self.names[place] for place in index), self.amounts[index], self.sizes[index])

    def influences(self) -> Amounts:
        """Returns the change of the ratio by each unit, `(a - r s) / sum s` with r the ratio (delta method)."""
        total = self.sizes.sum()
        return (self.amounts - self.amounts.sum() / total * self.sizes) / total

    def ratio(self) -> float:
        """Returns the figure, `sum a / sum s`."""
        return float(self.amounts.sum() / self.sizes.sum())

    def error(self) -> float | None:
        """Returns the standard error of the figure; None with fewer than two units that count."""
        return ratio_error(self.amounts, self.sizes)


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        value: The number.
        error: Its standard error; None: not known.
        count: Documents or items that it is of; 0: not known.
        units: These documents or items; None: not recorded.
    """

    value: float
    error: float | None = None
    count: int = 0
    units: Units | None = None


@dataclass(frozen=True)
class Difference:
    """A figure of one model minus that of another.

    Attributes:
        value: The difference; of paired units alone where not all are paired.
        error: Its standard error; None: not known.
        num_pairs: Pairs of units; 0: not paired.
        df: Degrees of freedom of the error.
        p: Two-sided p-value; None: not tested.
    """

    value: float
    error: float | None = None
    num_pairs: int = 0
    df: float = math.inf
    p: float | None = None


def subtract(figure: Figure, base: Figure) -> Difference:
    """Returns a difference, paired if at least half of the units of the smaller sample have a partner in the other.

    Paired: the error is that of the mean change of a unit, by the delta method for two ratios; with `n` pairs, the test
    is Student's t with `n - 1` degrees of freedom, or for answers the exact sign test. Not paired: Welch's t.
    """
    if figure.units is not None and base.units is not None:
        one, other = figure.units.counted(), base.units.counted()
        places = pair(one.names, other.names)
        if len(places) >= 2 and len(places) >= LEAST_PAIRED * min(len(one.names), len(other.names)):
            here, there = zip(*places, strict=True)
            return _paired(one.take(here), other.take(there))
    return _unpaired(figure, base)


def pair(names: Sequence[str], others: Sequence[str]) -> list[tuple[int, int]]:
    """Returns the places of equal names in two lists; a name that comes back is paired first with first, and so on."""
    known = {name: place for place, name in enumerate(_numbered(others))}
    found = ((place, known.get(name)) for place, name in enumerate(_numbered(names)))
    return [(place, other) for place, other in found if other is not None]


def average(differences: Sequence[Difference]) -> Difference:
    """Returns the mean of differences that are independent of each other, each with the same weight.

    The degrees of freedom are Welch's and Satterthwaite's.
    """
    count = len(differences)
    value = sum(each.value for each in differences) / count
    pairs = min(each.num_pairs for each in differences)
    errors = [each.error for each in differences if each.error is not None]
    if len(errors) < count:
        return Difference(value, num_pairs=pairs)
    variances = [(error / count) ** 2 for error in errors]
    return _tested(value, variances, [each.df for each in differences], pairs)


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        found.append((name, seen[name]))
        seen[name] += 1
    return found


def _paired(one: Units, other: Units) -> Difference:
    count = len(one.names)
    value = one.ratio() - other.ratio()
    changes = one.influences() - other.influences()
    found = _tested(value, [count / (count - 1) * float(np.square(changes).sum())], [count - 1.0], count)
    if not (one.are_answers and other.are_answers):
        return found
    p = exact_sign_test(int((one.amounts > other.amounts).sum()), int((one.amounts < other.amounts).sum()))
    return Difference(found.value, found.error, count, found.df, p)


def _unpaired(figure: Figure, base: Figure) -> Difference:
    value = figure.value - base.value
    if figure.error is None or base.error is None:
        return Difference(value)
    freedoms = [each.count - 1.0 if each.count > 1 else math.inf for each in (figure, base)]
    return _tested(value, [figure.error**2, base.error**2], freedoms, 0)


def _tested(value: float, variances: Sequence[float], freedoms: Sequence[float], num_pairs: int) -> Difference:
    variance = sum(variances)
    if math.isnan(value) or not math.isfinite(variance):
        return Difference(value, num_pairs=num_pairs)
    if variance == 0:
        # Units that all change alike, such as all right and all wrong, show no spread to test against.
        return Difference(value, 0.0, num_pairs, p=1.0 if value == 0 else None)
    spread = sum(each**2 / freedom for each, freedom in zip(variances, freedoms, strict=True))
    df = math.inf if spread == 0 else variance**2 / spread
    error = math.sqrt(variance)
    return Difference(value, error, num_pairs, df, two_sided(value / error, df))
