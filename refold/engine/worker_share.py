"""The share of an engine's pages that one attention worker holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from refold.engine.channel import Channel, ChannelLost
from refold.engine.key_layout import KeyLayout
from refold.engine.pages import ABSENT, PageGroup


@dataclass(eq=False)
class WorkerShare:
    """The pages that one worker holds.

    Attributes:
        number: Which of the shares.
        name: Address of the worker.
        layout: Its heads and pages.
        heads: Its key-value heads.
        channel: To the worker.
        made: For each depth the places of its heads among those that the depth makes.
        tables: Block tables of each group as the worker knows them.
        lost: Why the worker is gone; None: it is there.
    """

    number: int
    name: str
    layout: KeyLayout
    heads: range
    channel: Channel
    made: Mapping[int, slice]
    tables: list[np.ndarray]
    lost: str | None = None

    @property
    def query_heads(self) -> slice:
        """The query heads of its key-value heads."""
        each = self.layout.num_queries
        return slice(self.heads.start * each, self.heads.stop * each)

    def send(self, header: Sequence[int], kind: str = "control", *tensors: Tensor) -> None:
        """Sends a message to the worker, unless it is lost; see `Channel.send`."""
        if self.lost is None:
            try:
                self.channel.send(header, kind, *tensors)
            except ChannelLost as error:
                self.lose(error)

    def lose(self, error: ChannelLost) -> None:
        """Notes that the worker is gone."""
        self.lost = self.lost or str(error)

    def first_page(self, group: PageGroup) -> int:
        """Returns the number that its first page has among the pages of all shares."""
        return self.number * group.share_pages if group.num_shares > 1 else 0

    def changes(self, place: int, group: PageGroup, rows: np.ndarray) -> list[np.ndarray]:
        """Returns the entries of block tables that the worker lacks, and marks them as sent.

        Returns:
            The number of changed entries; then their rows, blocks and pages.
        """
        known, width = self.tables[place], group.tables.shape[1]
        if known.shape[1] < width:
            known = np.pad(known, ((0, 0), (0, width - known.shape[1])), constant_values=ABSENT)
            self.tables[place] = known
        now = group.tables[rows]
        at, blocks = np.nonzero(now != known[rows])
        pages = now[at, blocks].astype(np.int64)
        known[rows[at], blocks] = pages
        pages[pages != ABSENT] -= self.first_page(group)
        return [np.array([len(at)]), rows[at], blocks, pages]
