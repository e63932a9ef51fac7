"""The pages of one launch in attention workers: positions, keys and queries go there, heads come back."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from refold.engine.channel import MAX_PARTS, ChannelLost, Message
from refold.engine.page_keeper import LaunchPages
from refold.engine.page_plan import Spans
from refold.engine.pages import PageGroup
from refold.engine.worker_share import WorkerShare
from refold.nn.mixers.store import StorePart


class RemotePages(LaunchPages):
    """The pages of one launch in a `RemoteKeeper`.

    Args:
        shares: Of the workers.
        groups: Block tables.
        spans: Rows and positions.
        slot: Names the launch to the workers.
    """

    def __init__(self, shares: Sequence[WorkerShare], groups: Sequence[PageGroup], spans: Spans, slot: int):
        self._slot, by_share = slot, [(share, _choose(share, groups, spans)) for share in shares]
        self._asks = [ask for _, ask in by_share if ask is not None]
        for share, ask in by_share:
            if ask is not None:
                self._open(share, groups, ask.spans)

    def append(self, parts: Sequence[StorePart], key: Tensor, value: Tensor) -> None:
        first = parts[0][1].start
        for ask in self._asks:
            made = ask.share.made[parts[0][0]]
            if made.start == made.stop or ask.share.lost is not None:
                continue
            both = torch.stack([ask.own(states[:, made], first).transpose(1, 2) for states in (key, value)])
            for own, rows in ask.parts(parts):
                header = (Message.APPEND, self._slot, len(own), 0, *_numbers(own))
                ask.share.send(header, "keys", both[:, rows].to(ask.share.layout.dtype))

    def attend(self, parts: Sequence[StorePart], query: Tensor) -> Tensor:
        first, asked = parts[0][1].start, []
        for ask in self._asks:
            if ask.share.lost is not None:
                continue
            heads = ask.share.query_heads
            sent = ask.own(query[:, heads], first).transpose(1, 2).to(ask.share.layout.dtype)
            answers = []
            try:
                for own, rows in ask.parts(parts):
                    piece = sent[rows]
                    answers.append(ask.share.channel.expect(piece.shape, piece.dtype, self._slot))
                    header = (Message.ATTEND, self._slot, len(own), piece.shape[2], *_numbers(own))
                    ask.share.channel.send(header, "queries", piece)
            except ChannelLost as error:
                ask.share.lose(error)
                continue
            if answers:
                asked.append((ask, answers))
        batch, num_heads, length, size = query.shape
        found = query.new_zeros(batch, length, num_heads, size)
        for ask, answers in asked:
            try:
                heads = torch.cat([answer.wait() for answer in answers]).to(query.device, query.dtype)
            except ChannelLost as error:
                ask.share.lose(error)
                continue
            if ask.index is None:
                found[:, :, ask.share.query_heads] = heads
            else:
                found.index_copy_(0, ask.places(first, batch, found.device), heads)
        return found

    def _open(self, share: WorkerShare, groups: Sequence[PageGroup], spans: Spans) -> None:
        """Tells a worker the positions of its rows."""
        numbers = [np.asarray(each, dtype=np.int64) for each in spans[:3]]
        for place, group in enumerate(groups):
            numbers += share.changes(place, group, numbers[0])
        told = torch.from_numpy(np.concatenate(numbers))
        share.send((Message.OPEN, self._slot, len(spans.rows), int(spans.flat), len(told)), "control", told)


class _Ask(NamedTuple):
    """The rows of a launch that one worker has: tokens of a flat launch, spans of others.

    Attributes:
        share: The worker's.
        spans: Its spans.
        index: Its rows; None: all.
        before: For each row of the launch the number of its rows before it.
    """

    share: WorkerShare
    spans: Spans
    index: np.ndarray | None = None
    before: np.ndarray | None = None

    def own(self, states: Tensor, first: int) -> Tensor:
        """Returns its rows of states that begin with row `first` of the launch."""
        return states if self.index is None else states.index_select(0, self.places(first, len(states), states.device))

    def places(self, first: int, count: int, device: torch.device) -> Tensor:
        """Returns the places of its rows among `count` rows from row `first` on."""
        assert self.index is not None
        low, high = np.searchsorted(self.index, (first, first + count))
        return torch.from_numpy(self.index[low:high] - first).to(device)

    def parts(self, parts: Sequence[StorePart]) -> list[tuple[list[StorePart], slice]]:
        """Returns pieces of at most `MAX_PARTS` parts in numbers of its rows, and the rows behind the first part's."""
        own = list(parts)
        if self.before is not None:
            counts = self.before
            cuts = (slice(int(counts[part.rows.start]), int(counts[part.rows.stop])) for part in parts)
            own = [part._replace(rows=cut) for part, cut in zip(parts, cuts, strict=True) if cut.stop > cut.start]
        pieces = [own[begin : begin + MAX_PARTS] for begin in range(0, len(own), MAX_PARTS)]
        first = own[0][1].start if own else 0
        return [(piece, slice(piece[0][1].start - first, piece[-1][1].stop - first)) for piece in pieces]


def _choose(share: WorkerShare, groups: Sequence[PageGroup], spans: Spans) -> _Ask | None:
    """Returns the rows of a launch that a worker has; None: it has none."""
    num_shares = groups[0].num_shares
    chosen = np.asarray(spans.rows) % num_shares == share.number % num_shares
    if share.lost is not None or not chosen.any():
        return None
    if chosen.all():
        return _Ask(share, spans)
    items = np.repeat(chosen, spans.lengths) if spans.flat else chosen
    own = Spans(spans.rows[chosen], spans.starts[chosen], spans.lengths[chosen], spans.flat)
    return _Ask(share, own, np.flatnonzero(items), np.concatenate(([0], np.cumsum(items))))


def _numbers(parts: Sequence[StorePart]) -> list[int]:
    return [number for depth, rows, own in parts for number in (depth, rows.start, rows.stop, own)]
