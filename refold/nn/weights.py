"""Weights on their way into products: floats, or the integers that a quantised module stores."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from refold.blueprint.integers import Scheme
from refold.nn.quantised import QuantisedLinear
from refold.nn.rounding import Rounded
from refold.nn.stored_integers import StoredIntegers


class StoredWeight(NamedTuple):
    """A weight that is stored as integers.

    Attributes:
        rounded: The integers.
        scheme: Their scheme.
    """

    rounded: Rounded
    scheme: Scheme

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return len(self.rounded.integers), self.rounded.columns

    def floats(self) -> Tensor:
        """Returns the weight as floats."""
        return self.rounded.dequantise()


Weight = Tensor | StoredWeight


def weight_of(linear: nn.Module) -> Weight:
    """Returns the weight of a linear."""
    if isinstance(linear, QuantisedLinear):
        return StoredWeight(linear.rounded(), linear.scheme)
    assert isinstance(linear, nn.Linear)
    return linear.weight.detach()


def stored_weights(held: StoredIntegers) -> dict[str, StoredWeight]:
    """Returns the quantised weights of a module by name."""
    return {name: StoredWeight(held.read(name), held.scheme(name)) for name in held}


def as_floats(weight: Weight) -> Tensor:
    """Returns a weight as floats."""
    return weight.floats() if isinstance(weight, StoredWeight) else weight


def stack_weights(weights: Sequence[Weight]) -> Weight | None:
    """Joins weights that read one input, their outputs side by side; None: they are stored in several forms."""
    tensors = [each for each in weights if isinstance(each, Tensor)]
    if len(tensors) == len(weights):
        return torch.cat(tensors)
    stored = [each for each in weights if isinstance(each, StoredWeight)]
    if len(stored) < len(weights) or any(each.scheme != stored[0].scheme for each in stored):
        return None
    first = stored[0]
    rounded = [each.rounded for each in stored]
    joined = Rounded(
        torch.cat([each.integers for each in rounded]),
        torch.cat([each.scale for each in rounded]),
        torch.cat([each.zero_point for each in rounded]),
        first.rounded.columns,
    )
    return StoredWeight(joined, first.scheme)
