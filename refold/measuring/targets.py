"""What a linear should compute on inputs that are no longer the source's."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from refold.measuring.weighting import INPUT_RIDGE, ridged


class Drift(NamedTuple):
    """What a linear sees in a folded model beside what it sees in the source, on the same tokens.

    Attributes:
        inputs: Sum of x x^T over tokens, with x what it sees in the folded model.
        drift: Sum of (x_source - x) x^T.
        tokens: How many.
    """

    inputs: Float[Tensor, "in in"]
    drift: Float[Tensor, "in in"]
    tokens: int

    def __add__(self, other: "Drift") -> "Drift":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Drift(self.inputs + other.inputs, self.drift + other.drift, self.tokens + other.tokens)

    def moment(self) -> Float[Tensor, "in in"]:
        """Returns E[x x^T] with its ridge."""
        return ridged(self.inputs / self.tokens, INPUT_RIDGE)

    def correction(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Returns the M with the least E|W x_source - (W + M) x|^2 + |M R|^2, where R R^T is the ridge, in float64."""
        moved = weight.double() @ (self.drift.double() / self.tokens)
        return torch.linalg.solve(self.moment(), moved.T).T


def drift_between(source: Float[Tensor, "*batch in"], folded: Float[Tensor, "*batch in"]) -> Drift:
    """Compares what a linear sees in the source and in the folded model on the same tokens."""
    theirs, ours = source.flatten(0, -2), folded.flatten(0, -2)
    return Drift(ours.T @ ours, (theirs - ours).T @ ours, len(ours))


def aimed_weight(weight: Float[Tensor, "out in"], drifts: tuple[Drift, Drift]) -> Float[Tensor, "out in"]:
    """Returns the weight that comes nearest, on what a linear sees, to what the source's gives on what that one sees.

    A little text says less about inputs of many dimensions than it seems to: a correction found on one half of the text
    is held against the other, and so much of it is made as helps there.

    Args:
        weight: The source's.
        drifts: Of two halves of the text.
    """
    gained = spent = 0.0
    for one, other in (drifts, drifts[::-1]):
        found = one.correction(weight)
        gained += float((weight.double() @ other.drift.double() * found).sum()) / other.tokens
        spent += float((found @ other.inputs.double() * found).sum()) / other.tokens
    share = min(1.0, max(0.0, gained / spent)) if spent > 0 else 0.0
    return (weight + share * (drifts[0] + drifts[1]).correction(weight)).float()
