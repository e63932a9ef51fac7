"""The store of one launch: memories that read and write pages and state slots of the launch's rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from refold.engine.page_keeper import LaunchPages, PageKeeper
from refold.engine.page_plan import Spans
from refold.engine.states import StatePools, exchange_inputs
from refold.nn.mixers.key_values import KeyValue
from refold.nn.mixers.store import Appended, Memory, Store, StorePart


@dataclass(frozen=True)
class PoolContents:
    """The pools as memories see them.

    Attributes:
        keeper: Holds keys and values, and attends to them.
        states: Of recurrent depths.
        device: Of the states.
        made: Depth and number of adapters to the keys and values of the prefix vectors, once they are made.
    """

    keeper: PageKeeper
    states: StatePools
    device: torch.device
    made: dict[tuple[int, int], KeyValue] = field(default_factory=dict)


class PagedStore(Store):
    """The memories of all depths for the spans of one launch.

    Args:
        contents: The pools.
        spans: Rows and positions.
    """

    def __init__(self, contents: PoolContents, spans: Spans):
        self.contents, self.spans = contents, spans
        self.pages: LaunchPages = contents.keeper.open(spans)
        self._rows: dict[tuple[int, int], Tensor] = {}
        self._ends = np.cumsum(spans.lengths) if spans.flat else np.arange(1, len(spans.rows) + 1)

    def memory(self, depth: int, adapters: int = 0) -> "PagedMemory":
        return PagedMemory(self, (StorePart(depth, slice(0, int(self._ends[-1])), adapters),))

    def row_memory(self, parts: Sequence[StorePart]) -> "PagedMemory":
        return PagedMemory(self, tuple(parts))

    def rows(self, part: slice) -> Tensor:
        """Returns the rows of neighbouring spans, for launches `[spans, tokens, D]`."""
        assert not self.spans.flat, "recurrent depths need launches of spans of one length"
        key = part.start, part.stop
        if key not in self._rows:
            rows = torch.from_numpy(np.asarray(self.spans.rows[part], dtype=np.int64))
            self._rows[key] = rows.to(self.contents.device)
        return self._rows[key]


class PagedMemory(Memory):
    """Pages and states of one depth, or of several depths for as many groups of neighbouring rows.

    Args:
        store: Of the launch.
        parts: Each depth with its rows, which together are all rows, in order.
    """

    attends = True

    def __init__(self, store: PagedStore, parts: tuple[StorePart, ...]):
        self._store, self._parts = store, parts

    def append(self, key: Tensor, value: Tensor, extra: Mapping[str, Any]) -> Appended:
        self._store.pages.append(self._parts, key, value)
        return Appended(key, value, extra)

    def attend(self, view: nn.Module, query: Tensor) -> Tensor:
        return self._store.pages.attend(self._parts, query)

    def state(self) -> Tensor | None:
        return self._read(True)

    def keep_state(self, state: Tensor) -> None:
        self._write(True, state)

    def exchange(self, inputs: Tensor, width: int, resets: Tensor | None) -> Tensor | None:
        assert resets is None, "documents of a packed row cannot be told apart here"
        return exchange_inputs(self._read(False), inputs, width, lambda kept: self._write(False, kept))

    def once(self, make: Callable[[], KeyValue]) -> KeyValue:
        ((depth, _, adapters),) = self._parts
        made, key = self._store.contents.made, (depth, adapters)
        if key not in made:
            found = make()
            # Before it is known as made: another half of the launch may attend as soon as it is.
            self._store.contents.keeper.keep_prefix(depth, adapters, found)
            made[key] = found
        return made[key]

    def _read(self, is_state: bool) -> Tensor | None:
        states = self._store.contents.states
        found = [states.read((depth, is_state), self._store.rows(part)) for depth, part, _ in self._parts]
        if len(found) == 1 or all(each is None for each in found):
            return found[0]
        shape = next(each.shape[1:] for each in found if each is not None)
        some = next(each for each in found if each is not None)
        sizes = [part.stop - part.start for _, part, _ in self._parts]
        return torch.cat(
            [some.new_zeros(size, *shape) if each is None else each for size, each in zip(sizes, found, strict=True)]
        )

    def _write(self, is_state: bool, entries: Tensor) -> None:
        for depth, part, _ in self._parts:
            self._store.contents.states.write((depth, is_state), self._store.rows(part), entries[part])
