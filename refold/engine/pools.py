"""The memory of an engine: pages of keys and values, slots of states, and cached prefixes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refold.blueprint.schema import Blueprint
from refold.engine.key_layout import make_layout
from refold.engine.page_keeper import LocalKeeper, PageKeeper
from refold.engine.page_plan import Spans
from refold.engine.paged_store import PagedStore, PoolContents
from refold.engine.pages import ABSENT, PageGroup, PoolSettings, paged_depths
from refold.engine.prefixes import CachedBlock, PrefixCache
from refold.engine.states import Snapshot, StatePools

MakeKeeper = Callable[[Sequence[PageGroup]], PageKeeper]
"""Makes the keeper of the pages of some block tables."""


@dataclass(frozen=True)
class Saved:
    """All that a row keeps, outside the pools.

    Attributes:
        begins: First block of each group.
        planes: For each group the row's pages of every plane.
        states: Of recurrent depths.
    """

    begins: tuple[int, ...]
    planes: tuple[tuple[Tensor, ...], ...]
    states: Snapshot

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(pages.nbytes for planes in self.planes for pages in planes) + self.states.num_bytes


class Pools:
    """Pages, states and cached prefixes of the rows of an engine. Rows are numbers below `max_rows`.

    Args:
        blueprint: The stack.
        settings: Sizes.
        make_keeper: Makes the keeper of keys and values, given block tables with as many shares of the rows; None: a
            local one on the pools' device.
        num_shares: Number of shares of the rows.
        device: Of the states; None: the pools' device.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        settings: PoolSettings,
        make_keeper: MakeKeeper | None = None,
        num_shares: int = 1,
        device: torch.device | None = None,
    ):
        self.settings, self.num_shares, depths = settings, num_shares, enumerate(blueprint.depths)
        mixing = [index for index, depth in depths if depth.mixer is not None]
        recurrent = [index for index in mixing if blueprint.keeps_state(index)]
        sizes = settings.page_size, settings.max_rows, num_shares
        self.groups = [PageGroup(window, settings.pages_of(window), *sizes) for window in paged_depths(blueprint)]
        self.states = StatePools(recurrent, settings.max_rows)
        if make_keeper is None:
            self.keeper: PageKeeper = LocalKeeper(make_layout(blueprint, settings), self.groups, settings.device)
        else:
            self.keeper = make_keeper(self.groups)
        self._contents = PoolContents(self.keeper, self.states, device or settings.device)
        self._cache = PrefixCache(settings.page_size, settings.num_saved_states)
        self._published: dict[int, list[CachedBlock]] = {}

    def open(self, spans: Spans) -> PagedStore:
        """Returns the store of one launch, whose tokens must have pages."""
        return PagedStore(self._contents, spans)

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages, and of the states made so far."""
        return self.keeper.num_bytes + self.states.num_bytes

    @property
    def free_pages(self) -> int:
        """Pages that rows may still get, in the group that has the fewest, cached prefixes without users included."""
        if not self.groups:
            return self.settings.num_pages
        unused = self._unused()
        return min(
            group.num_free + sum(block.pages[place] != ABSENT for block in unused)
            for place, group in enumerate(self.groups)
        )

    @property
    def used_pages(self) -> int:
        """Pages of rows and of the prefixes they share, in the group that has the most."""
        if not self.groups:
            return 0
        unused = self._unused()
        return max(
            group.num_pages - group.num_free - sum(block.pages[place] != ABSENT for block in unused)
            for place, group in enumerate(self.groups)
        )

    @property
    def cached_blocks(self) -> int:
        """Blocks of prefixes that are cached."""
        return len(self._cache)

    def reserve(self, row: int, num_tokens: int) -> bool:
        """Gives a row pages for all positions below `num_tokens`.

        Returns:
            False, with nothing changed, if there are too few pages.
        """
        lacking = [group.num_lacking(row, num_tokens) for group in self.groups]
        if not any(lacking):
            return True
        if not self._make_room(lacking, row):
            return False
        for group, count in zip(self.groups, lacking, strict=True):
            group.extend(row, count)
        return True

    def release(self, row: int, spoiled: bool = False) -> None:
        """Gives back all pages and states of a row.

        Args:
            row: Which.
            spoiled: Whether it may hold numbers that are not finite. Its pages are then filled with zeros, because zero
                weights of later rows would not remove those numbers, and prefixes it has published are dropped.
        """
        published = self._published.pop(row, [])
        if spoiled:
            self._drop_blocks([block for block in published if self._cache.holds(block)])
        for place, group in enumerate(self.groups):
            pages = group.pages(row)
            group.release(row)
            freed = [page for page in pages if not group.counts[page]]
            if spoiled and freed:
                self.keeper.wipe(place, freed)
        self.states.clear(row)

    def pass_window(self, row: int, position: int) -> None:
        """Gives back the pages that no window reaches from `position` on."""
        for group in self.groups:
            if group.window is not None:
                group.pass_blocks(row, _first_block(group, position))

    def attach_prefix(self, row: int, token_ids: Sequence[int], adapters: int = 0) -> int:
        """Gives an empty row the pages, and the states, of the longest cached prefix of a prompt.

        Args:
            row: Which.
            token_ids: The prompt. Its last token is never among those found.
            adapters: Number of the adapters that the row runs with; 0: the model's own.

        Returns:
            The number of tokens that are present.
        """
        size = self.settings.page_size
        chain = self._cache.find(token_ids, max(0, len(token_ids) - 1) // size, (self.share(row), adapters))
        while chain and not self._serves(chain):
            chain.pop()
        if not chain:
            return 0
        self._cache.touch(chain)
        for place, group in enumerate(self.groups):
            pages = [block.pages[place] for block in chain]
            first = 0 if group.window is None else _first_block(group, len(chain) * size)
            group.attach(row, [ABSENT] * first + pages[first:])
        if (states := chain[-1].states) is not None:
            self.states.restore([row], states, [0])
        return len(chain) * size

    def publish(self, row: int, token_ids: Sequence[int], num_tokens: int, adapters: int = 0) -> None:
        """Offers the full pages of a prompt's first tokens to later rows with the same adapters.

        Args:
            row: Which.
            token_ids: The prompt.
            num_tokens: How many tokens the row has run through all depths. The states of recurrent depths, which must
                be those after these tokens, are offered where a page ends there.
            adapters: As for `attach_prefix`.
        """
        size, owner = self.settings.page_size, (self.share(row), adapters)
        num_blocks = num_tokens // size
        chain = self._cache.find(token_ids, num_blocks, owner)
        for block, each in enumerate(chain):
            self._complete(each, row, block)
        pages = [[int(group.tables[row, block]) for group in self.groups] for block in range(len(chain), num_blocks)]
        added = self._cache.add(token_ids, chain, pages, owner)
        for block in added:
            for group, page in zip(self.groups, block.pages, strict=True):
                if page != ABSENT:
                    group.counts[page] += 1
        self._published.setdefault(row, []).extend(added)
        chain += added
        if chain and self.states.depths and num_tokens == num_blocks * size and chain[-1].states is None:
            self._cache.save_states(chain[-1], self.states.save([row]))
        self._cache.touch(chain)
        if not self.groups:
            # Without pages nothing else would ever ask for room.
            self._drop_blocks(list(self._cache)[: max(0, len(self._cache) - self.settings.num_pages)])

    def save_states(self, rows: int | Sequence[int], depths: Sequence[int] | None = None) -> Snapshot:
        """Returns a copy of the states of rows at recurrent depths (None: all)."""
        return self.states.save(_listed(rows), depths)

    def restore_states(self, rows: int | Sequence[int], snapshot: Snapshot) -> None:
        """Puts saved states back: some of the snapshot's rows, or to one row the only one of the snapshot."""
        # A sequence that gave way meanwhile has another row than when its states were saved.
        places = [0] if isinstance(rows, int) and len(snapshot.rows) == 1 else None
        self.states.restore(_listed(rows), snapshot, places)

    def copy_out(self, row: int) -> Saved:
        """Returns a copy of a row's pages and states in the host's memory. The row keeps them until it is released."""
        planes = [self.keeper.copy_out(place, group.pages(row)) for place, group in enumerate(self.groups)]
        begins = tuple(int(group.begins[row]) for group in self.groups)
        return Saved(begins, tuple(planes), self.states.save([row]))

    def copy_in(self, row: int, saved: Saved) -> bool:
        """Gives an empty row what another had.

        Returns:
            False, with nothing changed, if there are too few pages.
        """
        lacking = [len(planes[0]) for planes in saved.planes]
        if not self._make_room(lacking, row):
            return False
        for place, (group, begin, planes) in enumerate(zip(self.groups, saved.begins, saved.planes, strict=True)):
            group.begin(row, begin)
            group.extend(row, len(planes[0]))
            self.keeper.copy_in(place, group.pages(row), planes)
        self.states.restore([row], saved.states, [0])
        return True

    def drop_prefixes(self) -> None:
        """Gives up all cached prefixes that no row uses."""
        self._drop_blocks(self._unused())

    def share(self, row: int) -> int:
        """Returns the share of the rows to which a row belongs."""
        return row % self.num_shares

    def lost_shares(self) -> Mapping[int, str]:
        """Returns the shares whose pages are gone, and why; their cached prefixes are dropped."""
        lost = self.keeper.lost_shares()
        if lost:
            self._drop_blocks([block for block in self._cache if block.share in lost])
        return lost

    def close(self) -> None:
        """Gives up all pages. Nothing can run afterwards."""
        self.keeper.close()

    def check(self) -> None:
        """Checks that the owners of each page are counted rightly, and that no page is lost.

        Raises:
            AssertionError: They are not.
        """
        for place, group in enumerate(self.groups):
            counted = np.zeros_like(group.counts)
            for row in range(self.settings.max_rows):
                begin, end = int(group.begins[row]), int(group.ends[row])
                held = group.tables[row, begin:end]
                assert (held >= 0).all(), f"row {row} lacks pages of window {group.window}"
                outside = np.delete(group.tables[row], np.s_[begin:end])
                assert (outside == ABSENT).all(), f"row {row} has pages of window {group.window} outside its table"
                np.add.at(counted, held, 1)
            cached = [block.pages[place] for block in self._cache if block.pages[place] != ABSENT]
            np.add.at(counted, cached, 1)
            assert (counted == group.counts).all(), f"owners of pages of window {group.window} are counted wrongly"
            assert group.num_free == int((counted == 0).sum()), f"pages of window {group.window} are lost"
            assert group.can_find_free(), f"free pages of window {group.window} cannot be found"

    def _serves(self, chain: Sequence[CachedBlock]) -> bool:
        """Says whether a row can go on behind these blocks."""
        if self.states.depths and chain[-1].states is None:
            return False
        for place, group in enumerate(self.groups):
            first = 0 if group.window is None else _first_block(group, len(chain) * self.settings.page_size)
            if any(block.pages[place] == ABSENT for block in chain[first:]):
                return False
        return True

    def _complete(self, block: CachedBlock, row: int, place: int) -> None:
        """Adds pages that a cached block lacks and a row still has."""
        for number, group in enumerate(self.groups):
            page = int(group.tables[row, place])
            if block.pages[number] == ABSENT and page != ABSENT:
                block.pages[number] = page
                group.counts[page] += 1

    def _unused(self) -> list[CachedBlock]:
        """Returns the cached blocks that no row uses, the least recently used first."""
        return [
            block
            for block in self._cache
            if all(
                page == ABSENT or group.counts[page] == 1 for group, page in zip(self.groups, block.pages, strict=True)
            )
        ]

    def _make_room(self, lacking: Sequence[int], row: int) -> bool:
        """Makes free pages for a row, at the cost of cached prefixes; False, with nothing changed: too few."""
        share = self.share(row)
        short = [max(0, count - group.free[share]) for group, count in zip(self.groups, lacking, strict=True)]
        if not any(short):
            return True
        victims: list[CachedBlock] = []
        for block in self._unused():
            if block.share != share or not any(
                count > 0 and page != ABSENT for count, page in zip(short, block.pages, strict=True)
            ):
                continue
            victims.append(block)
            short = [count - (page != ABSENT) for count, page in zip(short, block.pages, strict=True)]
            if max(short) <= 0:
                self._drop_blocks(victims)
                return True
        return False

    def _drop_blocks(self, blocks: Sequence[CachedBlock]) -> None:
        if not blocks:
            return
        # A block left behind would be cached once more when its row publishes again, and then never look unused.
        blocks = self._cache.with_descendants(blocks)
        self._cache.remove(blocks)
        for block in blocks:
            for group, page in zip(self.groups, block.pages, strict=True):
                if page != ABSENT:
                    group.drop([page])


def _first_block(group: PageGroup, position: int) -> int:
    """Returns the first block that a token at `position` attends to."""
    return 0 if group.window is None else max(0, position - group.window + 1) // group.page_size


def _listed(rows: int | Sequence[int]) -> list[int]:
    return [rows] if isinstance(rows, int) else list(rows)
