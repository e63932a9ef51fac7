"""Prefixes of prompts whose pages and states are kept for later rows with the same tokens."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from refold.engine.states import Snapshot

Owner = tuple[int, int]
"""The share of the rows that has the pages of a prefix, and the number of the adapters that made them."""


@dataclass(eq=False)
class CachedBlock:
    """A full block of tokens behind a prefix of full blocks.

    Attributes:
        number: Names the prefix that ends with this block, and no other.
        share: The share of the rows that have its pages.
        key: The number of the prefix before it, and the block's tokens as bytes.
        pages: Page of each group; `ABSENT` where a window had passed it.
        states: Of recurrent depths after its last token; None: none were saved.
    """

    number: int
    share: int
    key: tuple[int, bytes]
    pages: list[int]
    states: Snapshot | None = None


class PrefixCache:
    """The cached blocks, the least recently used first. Blocks stand before the prefixes they lengthen.

    Keys hold the tokens themselves, so that equal keys mean equal prefixes.

    Args:
        block_size: Tokens of a block.
        num_saved_states: The most blocks with states.
    """

    def __init__(self, block_size: int, num_saved_states: int):
        self.block_size, self._num_saved = block_size, num_saved_states
        self._blocks: OrderedDict[tuple[int, bytes], CachedBlock] = OrderedDict()
        self._saved: OrderedDict[int, CachedBlock] = OrderedDict()
        self._numbers = count()
        self._roots: dict[Owner, int] = {}

    def __iter__(self) -> Iterator[CachedBlock]:
        return iter(self._blocks.values())

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, token_ids: Sequence[int], num_blocks: int, owner: Owner = (0, 0)) -> list[CachedBlock]:
        """Returns the cached blocks of an owner, at most `num_blocks`, with which the tokens begin."""
        found: list[CachedBlock] = []
        for content in self._cut(token_ids, num_blocks):
            block = self._blocks.get((found[-1].number if found else self._root(owner), content))
            if block is None:
                break
            found.append(block)
        return found

    def add(
        self, token_ids: Sequence[int], before: list[CachedBlock], pages: list[list[int]], owner: Owner = (0, 0)
    ) -> list[CachedBlock]:
        """Adds blocks behind cached ones.

        Args:
            token_ids: From the first token on.
            before: From `find`.
            pages: Of each new block, in order.
            owner: Of the pages.

        Returns:
            The new blocks.
        """
        added: list[CachedBlock] = []
        parent = before[-1].number if before else self._root(owner)
        contents = list(self._cut(token_ids, len(before) + len(pages)))[len(before) :]
        for content, own in zip(contents, pages, strict=True):
            block = CachedBlock(next(self._numbers), owner[0], (parent, content), own)
            self._blocks[block.key] = block
            added.append(block)
            parent = block.number
        return added

    def with_descendants(self, blocks: Sequence[CachedBlock]) -> list[CachedBlock]:
        """Returns blocks with all that stand behind them, which nobody could find any more without them."""
        children: dict[int, list[CachedBlock]] = {}
        for block in self:
            children.setdefault(block.key[0], []).append(block)
        found = {block.number: block for block in blocks}
        open_blocks = list(found.values())
        while open_blocks:
            for child in children.get(open_blocks.pop().number, ()):
                if child.number not in found:
                    found[child.number] = child
                    open_blocks.append(child)
        return list(found.values())

    def touch(self, chain: Sequence[CachedBlock]) -> None:
        """Makes the blocks of a prefix, from its first on, the most recently used ones."""
        for block in reversed(chain):
            self._blocks.move_to_end(block.key)
            if block.states is not None:
                self._saved.move_to_end(block.number)

    def save_states(self, block: CachedBlock, states: Snapshot) -> None:
        """Keeps states behind a block; beyond the largest number, those least recently used are dropped."""
        if not self._num_saved:
            return
        block.states = states
        self._saved[block.number] = block
        self._saved.move_to_end(block.number)
        while len(self._saved) > self._num_saved:
            _, oldest = self._saved.popitem(last=False)
            oldest.states = None

    def remove(self, blocks: Iterable[CachedBlock]) -> None:
        """Removes blocks; the owner of the pages gives them back."""
        for block in blocks:
            del self._blocks[block.key]
            self._saved.pop(block.number, None)

    def holds(self, block: CachedBlock) -> bool:
        """Says whether a block is still cached."""
        return self._blocks.get(block.key) is block

    def _root(self, owner: Owner) -> int:
        """Returns the number of the empty prefix of an owner: prefixes of two owners are never the same."""
        if owner not in self._roots:
            self._roots[owner] = next(self._numbers)
        return self._roots[owner]

    def _cut(self, token_ids: Sequence[int], num_blocks: int) -> Iterator[bytes]:
        size = self.block_size
        tokens = np.asarray(token_ids[: num_blocks * size], dtype=np.int64)
        return (tokens[begin : begin + size].tobytes() for begin in range(0, len(tokens) - size + 1, size))
