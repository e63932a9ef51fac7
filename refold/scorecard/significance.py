"""Two-sided tests of a difference, and their correction for several rows."""

import math
from collections.abc import Sequence

LEVEL = 0.05
"""Chance that a table column without any real difference has a row that is called significant."""

_TINY = 1e-300
_MAX_STEPS = 100_000


def two_sided(t: float, df: float) -> float:
    """Returns the probability that Student's t is at least as far from 0 as `t`: `I_{df/(df+t^2)}(df/2, 1/2)`.

    Args:
        t: A difference divided by its standard error.
        df: Degrees of freedom; infinity: the normal distribution.
    """
    if math.isinf(t):
        return 0.0
    if math.isinf(df):
        return math.erfc(abs(t) / math.sqrt(2))
    return incomplete_beta(df / 2, 0.5, df / (df + t * t))


def exact_sign_test(num_gains: int, num_losses: int) -> float:
    """Returns the two-sided probability of so uneven a split of the changed items, if both ways are equally likely.

    For answers that are right or wrong this is McNemar's test in its exact form: items that both models get right, or
    both get wrong, do not count.

    Args:
        num_gains: Items that only the first model gets right.
        num_losses: Items that only the second model gets right.
    """
    fewer, more = sorted((num_gains, num_losses))
    if fewer == more:
        return 1.0
    # The chance of at most `fewer` of the changed items is a value of the incomplete beta function.
    return min(1.0, 2 * incomplete_beta(float(more), fewer + 1.0, 0.5))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected by Holm's step-down rule, which holds for tests that depend on each other in any way.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979).
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        found[index] = largest
    return found


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Returns the regularised incomplete beta function `I_x(a, b)`, by its continued fraction.

    Numerical Recipes, 3rd edition, 6.4, with Lentz's method.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    )
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, _MAX_STEPS):
        for factor in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away_from_zero(1 + factor * d)
            c = _away_from_zero(1 + factor / c)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
