"""The tensors by which a depth changes the parts it runs: vectors and gains as modules, and all of them in one call."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refold.blueprint.schema import Pool
from refold.mixers.spec import Fill, Shape
from refold.nn.fills import make_fill
from refold.nn.lora import Adapter, PackedAdapter, join_adapters
from refold.nn.named_tensors import NamedTensors
from refold.nn.part import Lora, OwnVectors

MOST_KEPT = 64
"""Joined tensors that the first of several depths keeps: one for each split of a batch among loops."""
Name = TypeVar("Name", bound=str)


class OwnedVectors(NamedTensors):
    """The norms and biases a depth keeps for one of its parts, under the names they have in the part."""

    def __init__(self, shapes: Mapping[str, Shape], fills: Mapping[str, Fill]):
        super().__init__({name: make_fill(fills[name], shape) for name, shape in shapes.items()})
        self.names, self.fills = tuple(shapes), dict(fills)

    def forward(self) -> dict[str, Tensor]:
        """Returns all vectors by name. Offloading moves weights to the device for calls of `forward` only."""
        return dict(self._parameters)  # pyright: ignore[reportReturnType]

    def reset(self) -> None:
        """Fills all vectors anew."""
        for name, tensor in self().items():
            tensor.data.copy_(make_fill(self.fills[name], tuple(tensor.shape)))


class Gain(nn.Module):
    """The scale on everything that one part of a depth adds to the residual stream; 1 at first."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def reset(self) -> None:
        """Initialises the scale without effect."""
        nn.init.ones_(self.weight)

    def forward(self) -> Float[Tensor, " 1"]:
        """Returns the scale. Offloading moves weights to the device for calls of `forward` only."""
        return self.weight


class Owned(NamedTuple):
    """The tensors by which a depth changes the parts it runs.

    Attributes:
        adapters: By linear name.
        mixer_vectors: Norms and biases of its own for the mixer; None: the part's.
        mlp_vectors: Likewise for the MLP.
        gains: Scale of each part's update, `[1]`, or `[B, 1, 1]` with one for each row.
        joined: Results of `join_owned` by rows and what they own, of a packed depth, whose tensors do not change; else
            None.
    """

    adapters: Lora
    mixer_vectors: OwnVectors
    mlp_vectors: OwnVectors
    gains: Mapping[Pool, Tensor]
    joined: "dict[tuple[tuple[int, int, int], ...], Owned] | None" = None

    def scale(self, pool: Pool, update: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Returns the update of the residual stream, scaled where there is a gain."""
        return update * self.gains[pool] if pool in self.gains else update


def join_owned(rows: Sequence[slice], owned: Sequence[Owned]) -> Owned:
    """Returns the tensors of rows with several depths or adapters: adapters by group, vectors and gains by row.

    Args:
        rows: Neighbouring rows, in order.
        owned: Of the depth each group stands at; all own vectors and gains of the same names.
    """
    if len(owned) == 1:
        return owned[0]
    kept = owned[0].joined
    if kept is None:
        return _join(rows, owned)
    key = tuple((part.start, part.stop, id(each)) for part, each in zip(rows, owned, strict=True))
    if key not in kept:
        if len(kept) >= MOST_KEPT:
            kept.clear()
        kept[key] = _join(rows, owned)
    return kept[key]


def _join(rows: Sequence[slice], owned: Sequence[Owned]) -> Owned:
    adapters = [cast("Mapping[str, Adapter | PackedAdapter]", each.adapters) for each in owned]
    return Owned(
        join_adapters(rows, adapters),
        _join_vectors(rows, [each.mixer_vectors for each in owned]),
        _join_vectors(rows, [each.mlp_vectors for each in owned]),
        _join_vectors(rows, [each.gains for each in owned]) or {},
    )


def _join_vectors(rows: Sequence[slice], vectors: Sequence[Mapping[Name, Tensor] | None]) -> dict[Name, Tensor] | None:
    """Returns each vector as `[B, 1, size]`; as it is where all rows have the same."""
    given = [each for each in vectors if each is not None]
    if not given:
        return None
    first = given[0]
    if all(each[name] is first[name] for each in given for name in first):
        return dict(first)
    return {
        name: torch.cat(
            [each[name].expand(part.stop - part.start, 1, -1) for part, each in zip(rows, given, strict=True)]
        )
        for name in given[0]
    }
