"""Corrects predicted losses by looking: one factor for each class of choice, from measured candidates."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

SMALLEST = 2e-3
"""Nats that are added to predicted and measured losses before they are compared as ratios: below, they are noise."""
PULL, COMMON = 0.2, 0.01
"""Weights of d_c^2, the squared logarithm of a class's own factor, and of g^2, that of the factor of all classes."""
ROUNDS = 50


class Seen(NamedTuple):
    """A candidate's losses in nats per token.

    Attributes:
        predicted: Predicted loss by class of choice, without factors.
        measured: Measured divergence from the source, which the predictions estimate.
    """

    predicted: Mapping[str, float]
    measured: float


def fit_scales(seen: Sequence[Seen], classes: Collection[str] = ()) -> dict[str, float]:
    """Fits the factors s of the classes so that sum_c s_c p_jc is near the measured loss m_j of every candidate j.

    A factor is exp(g + d_c) with one g for all classes: an error of the predictions concerns most classes, and a class
    that no candidate has must not look cheap beside those that were corrected. Minimises the sum over j of
    log((sum_c s_c p_jc + e) / (m_j + e))^2, plus PULL sum_c d_c^2 + COMMON g^2, by damped Gauss-Newton steps.

    Args:
        seen: The candidates that were measured, at least one.
        classes: Further classes, which get a factor too.
    """
    names = sorted({name for each in seen for name, loss in each.predicted.items() if loss > 0} | {*classes})
    if not names:
        return {}
    predicted = np.array([[each.predicted.get(name, 0.0) for name in names] for each in seen])
    measured = np.log(np.maximum([each.measured for each in seen], 0.0) + SMALLEST)
    weights = np.sqrt([COMMON, *([PULL] * len(names))])

    def residuals(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = predicted * np.exp(logs[0] + logs[1:])
        total = parts.sum(axis=1) + SMALLEST
        slopes = parts / total[:, None]
        rows = np.concatenate([np.log(total) - measured, weights * logs])
        return rows, np.concatenate([np.column_stack([slopes.sum(axis=1), slopes]), np.diag(weights)])

    logs, damping = np.zeros(1 + len(names)), 1e-3
    rows, slopes = residuals(logs)
    for _ in range(ROUNDS):
        step = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(logs)), -slopes.T @ rows)
        tried = residuals(logs + step)
        if tried[0] @ tried[0] < rows @ rows:
            logs, (rows, slopes), damping = logs + step, tried, damping / 3
        else:
            damping *= 10
        if np.abs(step).max() < 1e-9:
            break
    return {name: float(value) for name, value in zip(names, np.exp(logs[0] + logs[1:]), strict=True)}
