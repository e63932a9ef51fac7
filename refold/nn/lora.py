"""Adapters: the tensors by which a depth changes a linear that it shares with other depths."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refold.blueprint.integers import Scheme
from refold.nn.named_tensors import NamedTensors
from refold.nn.stored_integers import StoredIntegers, keep_scales

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
        # Pairs that are stored as integers are dequantised to float32.
        return y + nn.functional.linear(nn.functional.linear(x, a.to(x.dtype)), b.to(x.dtype))


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
        quantised: Scheme of pairs that are stored as integers, which are those that replace a stored weight.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]], quantised: Mapping[str, Scheme] | None = None):
        factors = {
            f"{name}.{side}": shape
            for name, (rank, columns, rows) in shapes.items()
            for side, shape in (("a", (rank, columns)), ("b", (rows, rank)))
        }
        schemes = {name: (quantised or {}).get(name.rpartition(".")[0]) for name in factors}
        super().__init__({name: torch.empty(shape) for name, shape in factors.items() if schemes[name] is None})
        self.names = {name: (f"{name}.a", f"{name}.b") for name in shapes}
        self.stored = StoredIntegers(
            self, {name: (scheme, factors[name]) for name, scheme in schemes.items() if scheme is not None}
        )
        self.reset()

    def reset(self) -> None:
        """Initialises all pairs without effect."""
        for a, b in self.names.values():
            if a not in self.stored:
                held = cast("dict[str, Tensor]", self._parameters)
                nn.init.normal_(held[a], std=held[a].shape[1] ** -0.5)
                nn.init.zeros_(held[b])
        self.stored.reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        keep_scales(self, lambda: super(LoraPairs, self)._apply(fn, recurse))
        return self

    def forward(self) -> dict[str, Pair]:
        """Returns the factors by linear name. Offloading moves weights to the device for calls of `forward` only."""
        held = {**cast("dict[str, Tensor]", self._parameters), **self.stored.dequantise()}
        return {name: (held[a], held[b]) for name, (a, b) in self.names.items()}


class Coefficients(nn.Module):
    """Holds a depth's coefficients `[out, rank]` by linear name, for linears of which the part stores a basis.

    Args:
        shapes: Linear name to `(out, rank)`.
        std: Standard deviation of initial coefficients.
        quantised: Scheme of coefficients that are stored as integers.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], std: float, quantised: Mapping[str, Scheme] | None = None
    ):
        super().__init__()
        self.std, self.names, schemes = std, tuple(shapes), quantised or {}
        for name, shape in shapes.items():
            if name not in schemes:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.stored = StoredIntegers(self, {name: (schemes[name], shapes[name]) for name in shapes if name in schemes})

    def reset(self) -> None:
        """Initialises all coefficients."""
        for name in self.names:
            if name not in self.stored:
                nn.init.normal_(self.get_parameter(name), std=self.std)
        self.stored.reset()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.get_parameter(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        keep_scales(self, lambda: super(Coefficients, self)._apply(fn, recurse))
        return self

    def forward(self) -> dict[str, Tensor]:
        """Returns all of them. Offloading moves weights to the device for calls of `forward` only."""
        held = {**self._parameters, **self.stored.dequantise()}
        return {name: held[name] for name in self.names}  # pyright: ignore[reportReturnType]
