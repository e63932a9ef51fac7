"""States and last inputs of recurrent depths, a slot for each row."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Kind = tuple[int, bool]
"""A depth, and whether its state (True) or its last inputs (False) are meant."""


class Snapshot(NamedTuple):
    """Saved states of some rows.

    Attributes:
        rows: Which rows.
        depths: Which depths.
        tensors: By depth and kind, one entry for each row; empty where nothing was kept yet.
    """

    rows: tuple[int, ...]
    depths: tuple[int, ...]
    tensors: dict[Kind, Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for each in self.tensors.values())


class StatePools:
    """For each recurrent depth a tensor `[max_rows, ...]` of states, and one of last inputs.

    Both are made from the sizes of the first that a mixer keeps. Zeros stand for a row without any.

    Args:
        depths: The recurrent depths.
        max_rows: Slots.
    """

    def __init__(self, depths: Sequence[int], max_rows: int):
        self.depths, self.max_rows = tuple(depths), max_rows
        self._pools: dict[Kind, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots made so far."""
        return sum(pool.nbytes for pool in self._pools.values())

    def read(self, kind: Kind, rows: Tensor) -> Tensor | None:
        """Returns the entries of rows; None if no row has any."""
        pool = self._pools.get(kind)
        return None if pool is None else pool.index_select(0, rows)

    def write(self, kind: Kind, rows: Tensor, entries: Float[Tensor, "B ..."]) -> None:
        """Keeps the entries of rows."""
        pool = self._pools.get(kind)
        if pool is None:
            pool = self._pools[kind] = entries.new_zeros(self.max_rows, *entries.shape[1:])
        pool.index_copy_(0, rows, entries.to(pool.dtype))

    def clear(self, row: int) -> None:
        """Makes a row's slots those of a row without tokens."""
        for pool in self._pools.values():
            pool[row].zero_()

    def save(self, rows: Sequence[int], depths: Sequence[int] | None = None) -> Snapshot:
        """Returns a copy of the slots of rows.

        Args:
            rows: Which.
            depths: Which; None: all.
        """
        depths = self.depths if depths is None else tuple(depths)
        chosen = [kind for kind in self._pools if kind[0] in depths]
        index = torch.tensor(rows, dtype=torch.long)
        found = {kind: self._pools[kind].index_select(0, index.to(self._pools[kind].device)) for kind in chosen}
        return Snapshot(tuple(rows), depths, found)

    def restore(self, rows: Sequence[int], snapshot: Snapshot, places: Sequence[int] | None = None) -> None:
        """Puts saved slots back.

        Args:
            rows: To which rows.
            snapshot: From `save`.
            places: The entry of the snapshot for each row; None: by the rows' own numbers.
        """
        if places is None:
            places = [snapshot.rows.index(row) for row in rows]
        target, chosen = torch.tensor(rows, dtype=torch.long), torch.tensor(places, dtype=torch.long)
        for kind, pool in self._pools.items():
            if kind[0] in snapshot.depths and kind not in snapshot.tensors:
                # When the snapshot was taken, no row had any.
                pool.index_fill_(0, target.to(pool.device), 0)
        for kind, entries in snapshot.tensors.items():
            self.write(kind, target.to(entries.device), entries.index_select(0, chosen.to(entries.device)))


def exchange_inputs(
    before: Float[Tensor, "B W C"] | None, inputs: Float[Tensor, "B T C"], width: int, keep: Callable[[Tensor], None]
) -> Float[Tensor, "B W C"] | None:
    """Returns the inputs before a call, and keeps the last `width` of all, with zeros before the first.

    Args:
        before: The last `width` inputs of earlier calls; None: there were none.
        inputs: Of this call.
        width: How many are kept.
        keep: Keeps them.
    """
    if inputs.shape[1] >= width:
        keep(inputs[:, -width:])
    elif before is None:
        keep(torch.nn.functional.pad(inputs, (0, 0, width - inputs.shape[1], 0)))
    else:
        keep(torch.cat((before[:, inputs.shape[1] :], inputs), dim=1))
    return before


def row_index(rows: np.ndarray, device: torch.device) -> Tensor:
    """Returns rows as an index on a device."""
    return torch.from_numpy(rows.astype(np.int64)).to(device)
