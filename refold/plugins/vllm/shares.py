"""One process's share of each tensor: rows or columns of linears by heads and by the width of the MLP."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from refold.families.arch import ArchSpec

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj")
"""Linears whose outputs are split among processes; those of all others are sums over the processes."""
Load = Callable[[Tensor], None]
"""Puts a tensor of the folder into its place."""


class Shares(NamedTuple):
    """The share of one process of tensor parallelism.

    Attributes:
        arch: The architecture.
        rank: Which process.
        size: Number of processes.
    """

    arch: ArchSpec
    rank: int
    size: int

    @property
    def num_heads(self) -> int:
        """Query heads of the process."""
        return self.arch.num_attention_heads // self.size

    @property
    def num_key_value_heads(self) -> int:
        """Key-value heads of the process; with fewer heads than processes, several processes have the same one."""
        return max(1, self.arch.num_key_value_heads // self.size)

    def wide(self, linear: str) -> slice:
        """Returns the numbers of the process on the split side: outputs of a column-parallel linear, else inputs."""
        if linear in ("k_proj", "v_proj"):
            size = self.num_key_value_heads * self.arch.head_dim
            place = self.rank * self.arch.num_key_value_heads // self.size
            begin = place * self.arch.head_dim
        else:
            is_of_heads = linear in ("q_proj", "o_proj")
            size = self.num_heads * self.arch.head_dim if is_of_heads else self.arch.intermediate_size // self.size
            begin = self.rank * size
        return slice(begin, begin + size)

    def sides(self, linear: str) -> tuple[slice, slice]:
        """Returns the rows and the columns of the process in the weight `[out, in]` of a linear."""
        if linear in COLUMN_PARALLEL:
            return self.wide(linear), slice(None)
        return slice(None), self.wide(linear)


class TensorPlaces:
    """The places of the tensors of a folder in the modules of this process."""

    def __init__(self) -> None:
        self._load: dict[str, Load] = {}

    def put(self, name: str, load: Load) -> None:
        """Adds a place.

        Args:
            name: Of the tensor in the folder.
            load: Puts the tensor there.
        """
        assert name not in self._load, name
        self._load[name] = load

    def allot(self, name: str, share: nn.Parameter, source: tuple[slice, ...], at: slice = slice(None)) -> None:
        """Adds a place for a part of a tensor.

        Args:
            name: Of the tensor in the folder.
            share: The parameter that holds the part.
            source: The part.
            at: Rows of the parameter.
        """
        self.put(name, lambda tensor: _copy(share, at, tensor[source]))

    def names(self) -> set[str]:
        """Returns the names of all tensors that are wanted."""
        return set(self._load)

    def load(self, name: str, tensor: Tensor) -> None:
        """Puts a tensor into its place."""
        self._load[name](tensor)


def empty(*shape: int) -> nn.Parameter:
    """Returns a parameter without values, of the default dtype and on the default device."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


@torch.no_grad()
def _copy(share: nn.Parameter, at: slice, part: Tensor) -> None:
    target = share[at]
    assert target.shape == part.shape, (target.shape, part.shape)
    target.copy_(part)
