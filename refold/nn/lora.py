"""Adapters: the tensors by which a depth changes a linear that it shares with other depths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
"""`(a [rank, in], b [out, rank])`."""


class Adapter(NamedTuple):
    """The tensors of one depth for one linear of a part it runs.

    Attributes:
        pair: LoRA factors; None: the depth has no LoRA here.
        coefficients: B `[out, rank]` of a linear of which the part stores only the basis A; None: the part stores all.
    """

    pair: Pair | None = None
    coefficients: Tensor | None = None

    def project(self, linear: nn.Module, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Runs the stored linear, with the depth's coefficients where it stores a basis."""
        return linear(x) if self.coefficients is None else linear(x, self.coefficients)

    def apply(self, y: Float[Tensor, "*batch out"], x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Returns y + B (A x); y where there is no pair."""
        if self.pair is None:
            return y
        a, b = self.pair
        return y + nn.functional.linear(nn.functional.linear(x, a), b)


@dataclass(frozen=True)
class RowAdapters:
    """The adapters of several depths for one linear, each for a run of neighbouring rows of the batch.

    Attributes:
        groups: Rows and the adapter of the depth they stand at; together all rows, in order.
    """

    groups: tuple[tuple[slice, Adapter], ...]

    def project(self, linear: nn.Module, x: Float[Tensor, "B T in"]) -> Float[Tensor, "B T out"]:
        """Runs the stored linear once for all rows; a basis is multiplied by each group's coefficients."""
        given = [(rows, own.coefficients) for rows, own in self.groups if own.coefficients is not None]
        return linear(x, given) if given else linear(x)

    def apply(self, y: Float[Tensor, "B T out"], x: Float[Tensor, "B T in"]) -> Float[Tensor, "B T out"]:
        """Adds each group's low-rank update to its rows."""
        if all(own.pair is None for _, own in self.groups):
            return y
        return torch.cat([own.apply(y[rows], x[rows]) for rows, own in self.groups])


LinearAdapter = Adapter | RowAdapters
"""The adapter of one linear as a stored part sees it: `project` runs the linear, `apply` adds the update."""


def join_adapters(rows: Sequence[slice], adapters: Sequence[dict[str, Adapter]]) -> dict[str, LinearAdapter]:
    """Returns the adapters by linear name of rows that stand at several depths.

    Args:
        rows: Neighbouring rows, in order.
        adapters: By linear name, of the depth each group stands at.
    """
    names = dict.fromkeys(name for each in adapters for name in each)
    return {
        name: RowAdapters(tuple((part, each.get(name, Adapter())) for part, each in zip(rows, adapters, strict=True)))
        for name in names
    }


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

    def forward(self) -> Pair:
        """Returns both factors. Read here, because offloading moves weights around `forward` alone."""
        # Attributes of modules are looked up in three dictionaries one after another; every linear's pair is asked.
        parameters = self._parameters
        return parameters["a"], parameters["b"]  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        return f"rank={self.a.shape[0]}, in={self.a.shape[1]}, out={self.b.shape[0]}"


class Coefficients(nn.Module):
    """Holds a depth's coefficients `[out, rank]` by linear name, for linears of which the part stores a basis.

    Args:
        shapes: Linear name to `(out, rank)`.
        std: Standard deviation of initial coefficients.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], std: float):
        super().__init__()
        self.std = std
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def reset(self) -> None:
        """Initialises all coefficients."""
        for coefficients in self.parameters():
            nn.init.normal_(coefficients, std=self.std)

    def __len__(self) -> int:
        return len(self._parameters)

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.get_parameter(name)

    def forward(self) -> dict[str, Tensor]:
        """Returns all of them. Read here, because offloading moves weights around `forward` alone."""
        return dict(self._parameters)  # pyright: ignore[reportReturnType]
