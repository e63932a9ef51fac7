"""Where a launch reads and writes pages: built once for each group of pages, and used by all of its depths."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from refold.engine.pages import PageGroup

LONG_SPAN = 16
"""Spans of at least so many tokens attend one by one, to keys that are gathered; shorter ones together, by pages."""
SPARSEST = 2
"""Pages are read where they lie if the range from the lowest to the highest is at most so many times their number."""
MOST_SETS = 8
"""Sets of spans with common pages whose common pages are read once; with more sets each span reads its own copy."""


class Spans(NamedTuple):
    """The tokens of a launch, as numpy arrays with one entry for each span.

    Attributes:
        rows: The row of each span.
        starts: Position of its first token.
        lengths: Number of its tokens.
        flat: Whether the launch's tensors are `[tokens, 1, D]`, span after span; otherwise `[spans, tokens, D]`, and
            all lengths are equal.
    """

    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    flat: bool


@dataclass(frozen=True)
class PageSet:
    """Pages that are multiplied together.

    Attributes:
        low: First page of the range that is read where it lies.
        high: End of the range.
        pages: Pages that are copied instead; None: the range is read.
        spans: Spans that attend to all of the pages; None: the run's only span. Where `owner` is there, the one span of
            each page instead, 0 where a page has none.
        owner: The span of each page, and the number of spans where a page has none.
    """

    low: int
    high: int
    pages: Int[Tensor, " pages"] | None = None
    spans: Int[Tensor, " spans"] | None = None
    owner: Int[Tensor, " pages"] | None = None

    @property
    def num_pages(self) -> int:
        """Pages of the set, or of the range that is read."""
        return self.high - self.low if self.pages is None else len(self.pages)


@dataclass(frozen=True)
class SpanRun:
    """Neighbouring spans of equal length that attend in one go.

    The scores of a set's pages with one span each make one entry a page; those of common pages make an entry for each
    page and span, page after page. Entries are numbered set after set.

    Attributes:
        begin: First of their tokens in the plan's part of the launch.
        num_spans: How many spans.
        length: Tokens of each.
        num_blocks: Blocks of keys of the span that has the most.
        sets: All pages.
        slot: For each entry its place among `num_spans * num_blocks` blocks, 0 if a page has no span; None: the only
            span's pages, in order.
        entry: For each of those blocks the number of its entry, 0 if there is none.
        hidden: `[spans, 1, 1, T, keys]`: positions that a token may not attend to; None: there are none.
        first_hidden: Column of the table of scores where `hidden` begins; no column before it is hidden.
        num_keys: Columns up to the last that any token attends to.
        is_causal: Whether the only span begins at position 0 and has no window.
    """

    begin: int
    num_spans: int
    length: int
    num_blocks: int
    sets: tuple[PageSet, ...]
    slot: Int[Tensor, " entries"] | None
    entry: Int[Tensor, " blocks"] | None
    hidden: Bool[Tensor, "spans 1 1 T keys"] | None
    first_hidden: int
    num_keys: int
    is_causal: bool

    @property
    def num_tokens(self) -> int:
        """Tokens of all spans."""
        return self.num_spans * self.length


@dataclass
class PagePlan:
    """The pages of some neighbouring spans of a launch, in one group.

    Attributes:
        group: The group.
        pages: Page of each token, span after span.
        offsets: Place of each token in its page.
        runs: The spans.
        device: Of the pools.
    """

    group: PageGroup
    pages: np.ndarray
    offsets: np.ndarray
    runs: list[SpanRun]
    device: torch.device
    _places: dict[int, Tensor] = field(default_factory=dict)

    def places(self, num_heads: int) -> Int[Tensor, " keys"]:
        """Returns the row of each token's keys, head by head, in a plane `[pages * num_heads * page_size, K]`."""
        if num_heads not in self._places:
            heads = np.arange(num_heads)
            size = self.group.page_size
            rows = (self.pages[:, None] * num_heads + heads) * size + self.offsets[:, None]
            self._places[num_heads] = _tensor(rows.reshape(-1), self.device)
        return self._places[num_heads]


def plan_pages(group: PageGroup, spans: Spans, device: torch.device) -> PagePlan:
    """Returns the pages of spans, all of which the rows' tables must cover."""
    size = group.page_size
    rows, starts, lengths = (np.asarray(each, dtype=np.int64) for each in spans[:3])
    ends = np.cumsum(lengths)
    positions, of_token = starts, rows
    if ends[-1] > len(rows):
        positions = np.arange(int(ends[-1])) + np.repeat(starts - ends + lengths, lengths)
        of_token = np.repeat(rows, lengths)
    pages = group.tables[of_token, positions // size].astype(np.int64)
    assert pages.min() >= 0, "a token has no page: reserve pages for all positions of a span"
    cuts = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(rows)]
    runs: list[SpanRun] = []
    for first, last in pairwise(cuts):
        length = int(lengths[first])
        step = 1 if length >= LONG_SPAN else last - first
        for begin in range(first, last, step):
            chosen = slice(begin, begin + step)
            runs.append(_plan_run(group, rows[chosen], starts[chosen], length, int(ends[begin]) - length, device))
    return PagePlan(group, pages, positions % size, runs, device)


def _plan_run(
    group: PageGroup, rows: np.ndarray, starts: np.ndarray, length: int, begin: int, device: torch.device
) -> SpanRun:
    size, window, num_spans = group.page_size, group.window, len(rows)
    first = np.zeros_like(starts) if window is None else np.maximum(0, starts - window + 1) // size
    counts = (starts + length - 1) // size + 1 - first
    num_blocks = int(counts.max())
    if num_spans == 1:
        pages = group.tables[rows[0], first[0] : first[0] + num_blocks].astype(np.int64)
        low, high = int(pages[0]), int(pages[-1]) + 1
        in_order = high - low == num_blocks and bool((np.diff(pages) == 1).all())
        sets, slot, entry = (PageSet(low, high, None if in_order else _tensor(pages, device)),), None, None
    else:
        blocks = np.arange(num_blocks)
        there = blocks < counts[:, None]
        table = group.tables[rows[:, None], np.minimum(first[:, None] + blocks, group.tables.shape[1] - 1)]
        span, block = np.nonzero(there)
        pages = table[span, block].astype(np.int64)
        sets, slots = _cut_sets(pages, span, span * num_blocks + block, num_spans, device)
        place = np.zeros(num_spans * num_blocks, dtype=np.int64)
        is_there = slots >= 0
        place[slots[is_there]] = np.flatnonzero(is_there)
        slot, entry = _tensor(np.maximum(slots, 0), device), _tensor(place, device)
    assert pages.min() >= 0, "a block that a span attends to has no page"
    queries = starts - first * size
    hidden, begins = _hidden(queries, num_blocks * size, length, window)
    mask = None if hidden is None else torch.from_numpy(hidden[:, None, None]).to(device)
    num_keys = int(queries.max()) + length
    is_causal = window is None and num_spans == 1 and not starts[0]
    return SpanRun(begin, num_spans, length, num_blocks, sets, slot, entry, mask, begins, num_keys, is_causal)


def _cut_sets(
    pages: np.ndarray, spans: np.ndarray, slots: np.ndarray, num_spans: int, device: torch.device
) -> tuple[tuple[PageSet, ...], np.ndarray]:
    """Returns the sets of pages, and the block of each entry; -1 for a page without span.

    Args:
        pages: Page of each block of a span.
        spans: The span of each.
        slots: The number of each block.
        num_spans: How many spans.
        device: Of the pools.
    """
    unique, which, counts = np.unique(pages, return_inverse=True, return_counts=True)
    common: list[PageSet] = []
    found = []
    if len(unique) < len(pages):
        member = np.zeros((len(unique), num_spans), dtype=bool)
        member[which, spans] = True
        shared = np.flatnonzero(counts > 1)
        kinds, of_page = np.unique(member[shared], axis=0, return_inverse=True)
        if len(kinds) <= MOST_SETS:
            slot_of = np.full(member.shape, -1, dtype=np.int64)
            slot_of[which, spans] = slots
            for number, kind in enumerate(kinds):
                own, chosen = shared[of_page.reshape(-1) == number], np.flatnonzero(kind)
                common.append(_page_set(unique[own], device, spans=_tensor(chosen, device)))
                found.append(slot_of[np.ix_(own, chosen)].reshape(-1))
            solo = counts[which] == 1
            pages, spans, slots = pages[solo], spans[solo], slots[solo]
    if not len(pages):
        return tuple(common), np.concatenate(found)
    low, high = int(pages.min()), int(pages.max()) + 1
    if high - low > SPARSEST * len(pages) or (len(unique) < len(which) and not common):
        first = PageSet(low, high, _tensor(pages, device), _tensor(spans, device), _tensor(spans, device))
        return (first, *common), np.concatenate((slots, *found))
    asker, owner = np.zeros(high - low, dtype=np.int64), np.full(high - low, num_spans)
    asker[pages - low] = owner[pages - low] = spans
    by_page = np.full(high - low, -1, dtype=np.int64)
    by_page[pages - low] = slots
    first = PageSet(low, high, None, _tensor(asker, device), _tensor(owner, device))
    return (first, *common), np.concatenate((by_page, *found))


def _page_set(pages: np.ndarray, device: torch.device, **fields: Tensor) -> PageSet:
    """Returns a set of pages in increasing order."""
    low, high = int(pages[0]), int(pages[-1]) + 1
    return PageSet(low, high, None if high - low == len(pages) else _tensor(pages, device), **fields)


def _hidden(queries: np.ndarray, num_keys: int, length: int, window: int | None) -> tuple[np.ndarray | None, int]:
    """Returns the mask `[spans, T, keys]` of positions that tokens may not attend to, and the first column of it.

    Args:
        queries: Place of each span's first token in its first block.
        num_keys: Keys of all blocks.
        length: T.
        window: Latest tokens that a token attends to.
    """
    begin = 0 if window is not None else int(queries.min()) + 1
    if begin >= num_keys:
        return None, num_keys
    keys, places = np.arange(begin, num_keys), queries[:, None, None] + np.arange(length)[:, None]
    hidden = keys > places
    if window is not None:
        hidden |= keys <= places - window
    return hidden, begin


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)
