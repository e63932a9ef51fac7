"""Adapters: the tensors by which a depth changes a linear that it shares with other depths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refold.nn.named_tensors import NamedTensors

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


class PackedAdapter:
    """Adapters of one depth that are prepared for inference, which packed parts know how to run."""


@dataclass(frozen=True)
class PackedRows(PackedAdapter):
    """Packed adapters of several depths, each for a run of neighbouring rows of the batch.

    Attributes:
        groups: Rows and the adapters of the depth they stand at; rows without adapters are left out.
    """

    groups: tuple[tuple[slice, PackedAdapter], ...]


LinearAdapter = Adapter | RowAdapters | PackedAdapter
"""The adapter of one linear as a stored part sees it: `project` runs the linear, `apply` adds the update. A packed one
belongs to several linears that are joined."""


def join_adapters(
    rows: Sequence[slice], adapters: Sequence[Mapping[str, Adapter | PackedAdapter]]
) -> dict[str, LinearAdapter]:
    """Returns the adapters by linear name of rows that stand at several depths.

    Args:
        rows: Neighbouring rows, in order.
        adapters: By linear name, of the depth each group stands at.
    """
    return {
        name: _join([(part, each.get(name, Adapter())) for part, each in zip(rows, adapters, strict=True)])
        for name in dict.fromkeys(name for each in adapters for name in each)
    }


def _join(groups: Sequence[tuple[slice, Adapter | PackedAdapter]]) -> LinearAdapter:
    packed = tuple((rows, own) for rows, own in groups if isinstance(own, PackedAdapter))
    if packed:
        return PackedRows(packed)
    return RowAdapters(tuple((rows, own) for rows, own in groups if isinstance(own, Adapter)))


class LoraPairs(NamedTensors):
    """Holds A and B of y = W x + B (A x) for some linears: scale exactly 1, no dropout (arXiv 2106.09685; 2410.20672).

    A new pair adds nothing: A is Gaussian, B is zero.

    Args:
        shapes: Linear name to rank, `in` and `out`.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]]):
        super().__init__(
            {
                f"{name}.{side}": torch.empty(shape)
                for name, (rank, columns, rows) in shapes.items()
                for side, shape in (("a", (rank, columns)), ("b", (rows, rank)))
            }
        )
        self.names = {name: (f"{name}.a", f"{name}.b") for name in shapes}
        self.reset()

    def reset(self) -> None:
        """Initialises all pairs without effect."""
        for a, b in self().values():
            nn.init.normal_(a, std=a.shape[1] ** -0.5)
            nn.init.zeros_(b)

    def forward(self) -> dict[str, Pair]:
        """Returns the factors by linear name. Offloading moves weights to the device for calls of `forward` only."""
        held = cast("dict[str, Tensor]", self._parameters)
        return {name: (held[a], held[b]) for name, (a, b) in self.names.items()}


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
        """Returns all of them. Offloading moves weights to the device for calls of `forward` only."""
        return dict(self._parameters)  # pyright: ignore[reportReturnType]
