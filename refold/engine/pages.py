"""Pages of keys and values: for each window of the stack a pool of pages, and a block table for each row."""

import heapq
import mmap
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from refold.blueprint.schema import Blueprint

ABSENT = -1
"""Entry of a block table without a page."""


@dataclass(frozen=True)
class PoolSettings:
    """Sizes of the pools of pages and states.

    Attributes:
        num_pages: Pages of each window's pool.
        max_rows: The largest number of sequences with pages at one time.
        page_size: Tokens of a page.
        dtype: Of keys and values.
        device: Of all pools.
        max_span: The most tokens of a row that one launch writes. Depths with a window then have no more pages than
            `max_rows` rows need; None: as many as all other depths.
        num_saved_states: The most prefixes whose recurrent states are saved.
    """

    num_pages: int
    max_rows: int
    page_size: int = 32
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    max_span: int | None = None
    num_saved_states: int = 32

    def pages_of(self, window: int | None) -> int:
        """Returns the number of pages of the pool of depths with a window."""
        if window is None or self.max_span is None:
            return self.num_pages
        return min(self.num_pages, self.max_rows * (-(-(window + self.max_span) // self.page_size) + 1))


def page_bytes(blueprint: Blueprint, settings: PoolSettings) -> dict[int | None, int]:
    """Returns, for each window, the bytes of one page at all depths with that window."""
    token = 2 * settings.page_size * blueprint.arch.head_dim * settings.dtype.itemsize
    return {window: token * sum(depths.values()) for window, depths in paged_depths(blueprint).items()}


def pool_bytes(blueprint: Blueprint, settings: PoolSettings) -> int:
    """Returns the bytes of all pages of all pools."""
    return sum(size * settings.pages_of(window) for window, size in page_bytes(blueprint, settings).items())


def fit_pages(blueprint: Blueprint, settings: PoolSettings, num_bytes: int) -> PoolSettings:
    """Returns the settings with the most pages, at most the number given, whose pools fit into `num_bytes`."""
    fits, over = 0, settings.num_pages + 1
    while over - fits > 1:
        middle = (fits + over) // 2
        if pool_bytes(blueprint, replace(settings, num_pages=middle)) <= num_bytes:
            fits = middle
        else:
            over = middle
    return replace(settings, num_pages=fits)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor of zeros; on the CPU the system provides each piece of its memory when it is first written."""
    num_bytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or not num_bytes:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(shape)


def paged_depths(blueprint: Blueprint) -> dict[int | None, dict[int, int]]:
    """Returns, for each window (None: the whole context), the depths that keep keys and the heads that each makes."""
    found: dict[int | None, dict[int, int]] = {}
    for index, depth in enumerate(blueprint.depths):
        num_heads = 0 if blueprint.keeps_state(index) else len(blueprint.made_heads(index))
        if num_heads:
            found.setdefault(depth.window, {})[index] = num_heads
    return found


class PageGroup:
    """The block tables of all depths with one window. A page holds the same tokens at each of these depths.

    Args:
        window: Latest tokens that a token attends to; None: all.
        num_pages: Number of pages; the shares of the rows have equally many.
        page_size: Tokens of a page.
        max_rows: The largest number of rows.
        num_shares: Number of shares; row r has pages of share `r % num_shares` alone.

    Attributes:
        tables: `[rows, blocks]`: page of each block of tokens, or `ABSENT`.
        begins: For each row the first block that it still has.
        ends: For each row the number of blocks that its table covers.
        counts: For each page the number of its owners: rows, and the cache of prefixes.
        free: For each share the number of its pages without owners.
    """

    def __init__(self, window: int | None, num_pages: int, page_size: int, max_rows: int, num_shares: int = 1):
        self.window, self.page_size, self.num_shares = window, page_size, num_shares
        self.share_pages = num_pages // num_shares
        self.num_pages = self.share_pages * num_shares
        self.tables = np.full((max_rows, 8), ABSENT, dtype=np.int32)
        self.begins = np.zeros(max_rows, dtype=np.int64)
        self.ends = np.zeros(max_rows, dtype=np.int64)
        self.counts = np.zeros(self.num_pages, dtype=np.int32)
        self.free = [self.share_pages] * num_shares
        self._heaps = [
            list(range(share * self.share_pages, (share + 1) * self.share_pages)) for share in range(num_shares)
        ]

    def num_lacking(self, row: int, num_tokens: int) -> int:
        """Returns the number of pages that a row lacks to hold positions below `num_tokens`."""
        return max(0, -(-num_tokens // self.page_size) - int(self.ends[row]))

    def extend(self, row: int, num_blocks: int) -> None:
        """Appends free pages to a row's table; there must be as many."""
        end = int(self.ends[row])
        self.widen(end + num_blocks)
        table = self.tables[row]
        for block in range(end, end + num_blocks):
            table[block] = self._take(row % self.num_shares, int(table[block - 1]) + 1 if block else ABSENT)
        self.ends[row] = end + num_blocks

    def begin(self, row: int, block: int) -> None:
        """Lets the table of an empty row begin at a block other than the first."""
        self.begins[row] = self.ends[row] = block

    def attach(self, row: int, pages: list[int]) -> None:
        """Gives an empty row pages that others own too; `ABSENT` ones only before all others."""
        self.widen(len(pages))
        self.tables[row, : len(pages)] = pages
        self.ends[row] = len(pages)
        self.begins[row] = sum(page == ABSENT for page in pages)
        for page in pages:
            if page != ABSENT:
                self.counts[page] += 1

    def pass_blocks(self, row: int, begin: int) -> None:
        """Gives back a row's blocks before block `begin`."""
        before, begin = int(self.begins[row]), min(begin, int(self.ends[row]))
        if begin > before:
            self.drop(self.tables[row, before:begin].tolist())
            self.tables[row, before:begin] = ABSENT
            self.begins[row] = begin

    def release(self, row: int) -> None:
        """Gives back all pages of a row."""
        self.pass_blocks(row, int(self.ends[row]))
        self.begins[row] = self.ends[row] = 0

    def drop(self, pages: list[int]) -> None:
        """Takes one owner from each page; pages without owners are free."""
        for page in pages:
            self.counts[page] -= 1
            if not self.counts[page]:
                share = page // self.share_pages
                self.free[share] += 1
                heapq.heappush(self._heaps[share], page)
        for share, heap in enumerate(self._heaps):
            if len(heap) > 2 * self.share_pages + 1:
                # Pages taken beside the heap's order stay in the heap until they come to its top.
                first = share * self.share_pages
                counts = self.counts[first : first + self.share_pages]
                self._heaps[share] = (first + np.flatnonzero(counts == 0)).tolist()

    def pages(self, row: int) -> list[int]:
        """Returns the pages that a row has, in the order of its tokens."""
        return self.tables[row, int(self.begins[row]) : int(self.ends[row])].tolist()

    @property
    def num_free(self) -> int:
        """Number of pages without owners."""
        return sum(self.free)

    def can_find_free(self) -> bool:
        """Says whether all free pages will be found."""
        return set(np.flatnonzero(self.counts == 0).tolist()) <= set().union(*self._heaps)

    def _take(self, share: int, wanted: int) -> int:
        """Returns the page `wanted` if it is free, so that rows lie in one piece, else the share's lowest free page."""
        first = share * self.share_pages
        if first <= wanted < first + self.share_pages and not self.counts[wanted]:
            page = wanted
        else:
            page = heapq.heappop(self._heaps[share])
            while self.counts[page]:
                page = heapq.heappop(self._heaps[share])
        self.counts[page] = 1
        self.free[share] -= 1
        return page

    def widen(self, num_blocks: int) -> None:
        """Makes room for so many blocks in all tables."""
        rows, width = self.tables.shape
        if num_blocks > width:
            wider = np.full((rows, max(num_blocks, 2 * width)), ABSENT, dtype=np.int32)
            wider[:, :width] = self.tables
            self.tables = wider
