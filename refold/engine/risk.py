"""Upper bounds on the mean loss of documents, and the search for the laxest threshold that keeps a tolerance."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

DocumentLosses = Float[np.ndarray, "num_documents"]


def upper_bound(losses: DocumentLosses, delta: float) -> float:
    """Returns a number that the mean loss of the population exceeds with probability at most `delta`.

    The betting bound of Waudby-Smith and Ramdas (arXiv 2010.09686) in the form of Bates et al. (arXiv 2101.02703,
    proposition 5): a gambler who bets on losses below R has the capital

        K_t(R) = prod over i <= t of (1 - v_i (L_i - R)),   v_i = min(1, sqrt(2 log(1/delta) / (n s_(i-1)^2)))

    with s^2 the variance of the losses so far. If R is at most the mean, the capital is a supermartingale, so it ever
    reaches 1/delta with probability at most delta (Ville). The bound is the least R at which it does.

    Args:
        losses: Losses in [0, 1] of independent documents, in an order that does not depend on them.
        delta: Probability of error, in (0, 1).
    """
    count = len(losses)
    if not count:
        return 1.0
    index = np.arange(1, count + 1)
    mean = (0.5 + np.cumsum(losses)) / (1 + index)
    variance = (0.25 + np.cumsum(np.square(losses - mean))) / (1 + index)
    before = np.concatenate([[0.25], variance[:-1]])
    bets = np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (count * before)))

    def wins(rate: float) -> bool:
        # At rate 0 a bet of 1 on a loss of 1 leaves nothing, whose logarithm is minus infinity.
        with np.errstate(divide="ignore"):
            capital = np.cumsum(np.log1p(-bets * (losses - rate)))
        return float(capital.max()) >= math.log(1 / delta)

    low, high = 0.0, 1.0
    if not wins(high):
        return 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if wins(middle) else (middle, high)
    return high


def documents_needed(tolerance: float, delta: float) -> int:
    """Returns the least number of documents without any loss whose bound is at most `tolerance`.

    It is near `log(1 / delta) / tolerance`; losses raise it.
    """

    def is_enough(count: int) -> bool:
        return upper_bound(np.zeros(count), delta) <= tolerance

    high = max(1, round(math.log(1 / delta) / tolerance))
    while not is_enough(high):
        high *= 2
    low = high // 4
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


class Passed(NamedTuple):
    """The laxest threshold that passed its test.

    Attributes:
        place: Its place in the sequence of thresholds.
        bound: Upper bound on its loss.
    """

    place: int
    bound: float


def search_in_order(
    thresholds: Sequence[float],
    losses: Callable[[float], DocumentLosses],
    tolerance: float,
    delta: float,
) -> Passed | None:
    """Tests thresholds from strict to lax and returns the last one before the first failure.

    A threshold passes if the upper bound on its loss is at most `tolerance`. Each test has the full `delta`: the first
    threshold whose true loss is above the tolerance is fixed, and nothing laxer is reached unless its test errs
    (fixed-sequence testing, arXiv 2110.01052, section 2.3). So the chosen threshold keeps the tolerance with
    probability `1 - delta`, although it was chosen on the same documents.

    Args:
        thresholds: From strict to lax, fixed before the documents were seen.
        losses: Returns the loss of each document at a threshold.
        tolerance: Largest mean loss.
        delta: Probability of error.

    Returns:
        None if the strictest threshold fails.
    """
    passed, same = None, None
    for place, threshold in enumerate(thresholds):
        found = losses(threshold)
        if passed is not None and same is not None and np.array_equal(found, same):
            passed = Passed(place, passed.bound)
            continue
        bound = upper_bound(found, delta)
        if bound > tolerance:
            break
        passed, same = Passed(place, bound), found
    return passed
