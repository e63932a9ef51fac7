"""The low-rank pair that relaxes one linear at one depth, and what else of that linear may be a depth's own."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
"""`(a [rank, in], b [out, rank])`."""


class Own(NamedTuple):
    """What a depth has of its own for one linear of a part it runs.

    Attributes:
        pair: The pair that relaxes it.
        coefficients: What is made of the part's basis, where the part stores no more than that.
    """

    pair: Pair | None = None
    coefficients: Tensor | None = None


class LoraPair(nn.Module):
    """Holds A and B of y = W x + B (A x): scale exactly 1, no dropout (arXiv 2106.09685; 2410.20672, section 2.3).

    A new pair adds nothing: A is Gaussian, B is zero.
    """

    def __init__(self, rank: int, in_features: int, out_features: int):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, rank))
        self.reset()

    def reset(self) -> None:
        """Initialises the pair without effect."""
        nn.init.normal_(self.a, std=self.a.shape[1] ** -0.5)
        nn.init.zeros_(self.b)

    @property
    def pair(self) -> Pair:
        return self.a, self.b

    def extra_repr(self) -> str:
        return f"rank={self.a.shape[0]}, in={self.a.shape[1]}, out={self.b.shape[0]}"


def relax(y: Float[Tensor, "*batch out"], x: Float[Tensor, "*batch in"], pair: Pair) -> Float[Tensor, "*batch out"]:
    """Adds B (A x) to what the stored linear gave."""
    a, b = pair
    return y + nn.functional.linear(nn.functional.linear(x, a), b)
