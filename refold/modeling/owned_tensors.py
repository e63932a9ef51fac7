"""The tensors by which a depth changes the parts it runs: vectors and gains as modules, and all of them in one call."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refold.blueprint.schema import Pool
from refold.mixers.spec import Fill, Shape
from refold.nn.fills import make_fill
from refold.nn.lora import Adapter, join_adapters
from refold.nn.part import Lora, OwnVectors


class VectorGroup(nn.Module):
    """Weight and bias, or other vectors, of one owner such as `input_norm`."""

    def forward(self) -> dict[str, Tensor]:
        """Returns them by kind. Read here, because offloading moves weights around `forward` alone."""
        return dict(self._parameters)  # pyright: ignore[reportReturnType]


class OwnedVectors(nn.Module):
    """The norms and biases a depth keeps for one of its parts, under the names they have in the part."""

    def __init__(self, shapes: Mapping[str, Shape], fills: Mapping[str, Fill]):
        super().__init__()
        self.names, self.fills = tuple(shapes), dict(fills)
        # Owner and kind of each; vectors such as `A_log` have no owner.
        self._places = [(name, *name.rpartition(".")[::2]) for name in shapes]
        for name, owner, kind in self._places:
            if owner and not hasattr(self, owner):
                self.add_module(owner, VectorGroup())
            self.get_submodule(owner).register_parameter(kind, nn.Parameter(make_fill(self.fills[name], shapes[name])))

    def forward(self) -> dict[str, Tensor]:
        """Returns all vectors by name."""
        groups = {owner: cast("VectorGroup", group).forward() for owner, group in self._modules.items()}
        groups[""] = cast("dict[str, Tensor]", self._parameters)
        return {name: groups[owner][kind] for name, owner, kind in self._places}

    def reset(self) -> None:
        """Fills all vectors anew."""
        for name in self.names:
            tensor = self.get_parameter(name)
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
        """Returns the scale. Read here, because offloading moves weights around `forward` alone."""
        return self.weight


class Owned(NamedTuple):
    """The tensors by which a depth changes the parts it runs.

    Attributes:
        adapters: By linear name.
        mixer_vectors: Norms and biases of its own for the mixer; None: the part's.
        mlp_vectors: Likewise for the MLP.
        gains: Scale of each part's update, `[1]`, or `[B, 1, 1]` with one for each row.
    """

    adapters: Lora
    mixer_vectors: OwnVectors
    mlp_vectors: OwnVectors
    gains: Mapping[Pool, Tensor]

    def scale(self, pool: Pool, update: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Returns the update of the residual stream, scaled where there is a gain."""
        return update * self.gains[pool] if pool in self.gains else update


def join_owned(rows: Sequence[slice], owned: Sequence[Owned]) -> Owned:
    """Returns the tensors of rows that stand at several depths: adapters by group, vectors and gains by row.

    Args:
        rows: Neighbouring rows, in order.
        owned: Of the depth each group stands at; all own the same vectors and gains.
    """
    adapters = [cast("dict[str, Adapter]", each.adapters) for each in owned]
    return Owned(
        join_adapters(rows, adapters),
        _join_vectors(rows, [each.mixer_vectors for each in owned]),
        _join_vectors(rows, [each.mlp_vectors for each in owned]),
        _join_vectors(rows, [each.gains for each in owned]) or {},
    )


def _join_vectors(rows: Sequence[slice], vectors: Sequence[OwnVectors]) -> OwnVectors:
    """Returns each vector as `[B, 1, size]`."""
    given = [each for each in vectors if each is not None]
    if not given:
        return None
    return {
        name: torch.cat(
            [each[name].expand(part.stop - part.start, 1, -1) for part, each in zip(rows, given, strict=True)]
        )
        for name in given[0]
    }
