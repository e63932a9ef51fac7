"""The keeper of pages that attention workers hold: it sends positions, keys and queries, and gets heads back."""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from weakref import finalize

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from refold.blueprint.part_sizes import head_counts
from refold.blueprint.schema import Blueprint
from refold.engine.channel import (
    MODEL,
    Channel,
    ChannelLost,
    Message,
    Traffic,
    open_channel,
    own_address,
    read_address,
)
from refold.engine.key_layout import KeyLayout, made_slice, make_layout
from refold.engine.page_keeper import PageKeeper
from refold.engine.page_plan import Spans
from refold.engine.pages import ABSENT, PageGroup, PoolSettings, paged_depths
from refold.engine.remote_pages import RemotePages
from refold.engine.settings import AttentionWorkers
from refold.engine.worker import POLL, SLOTS
from refold.engine.worker_process import WorkerProcesses
from refold.engine.worker_share import WorkerShare
from refold.errors import RefoldError
from refold.nn.mixers.key_values import KeyValue


class RemoteKeeper(PageKeeper):
    """Pages in attention workers, each of which holds some key-value heads of all rows, or all heads of some rows.

    Args:
        blueprint: The stack.
        sizes: Of all shares together.
        groups: Block tables.
        addresses: Of the workers.
        settings: How pages are split among them, and how long an answer may take.
        started: Those of them that end with this keeper; None: none.

    Raises:
        RefoldError: A worker cannot be reached, or has no room.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        sizes: PoolSettings,
        groups: Sequence[PageGroup],
        addresses: Sequence[str],
        settings: AttentionWorkers,
        started: WorkerProcesses | None = None,
    ):
        self.groups, self.split, self._started = list(groups), settings.split, started
        self.overlaps, self.device = settings.overlap, sizes.device
        self.num_shares = len(addresses) if self.split == "rows" else 1
        self._blueprint, self._slots = blueprint, list(range(SLOTS))
        self._depths = [list(depths) for depths in paged_depths(blueprint).values()]
        self.shares: list[WorkerShare] = []
        num_heads = max(head_counts(blueprint))
        try:
            for number, address in enumerate(addresses):
                heads = range(num_heads)
                if self.split == "heads":
                    cuts = [num_heads * place // len(addresses) for place in (number, number + 1)]
                    heads = range(*cuts)
                layout = make_layout(blueprint, sizes, heads, self.num_shares)
                channel = join_worker(address, layout, self.device, timedelta(seconds=settings.timeout))
                tables = [np.full((sizes.max_rows, 0), ABSENT, dtype=np.int32) for _ in self.groups]
                made = {depth: made_slice(blueprint, depth, heads) for depth in layout.groups}
                self.shares.append(WorkerShare(number, address, layout, heads, channel, made, tables))
        except BaseException:
            self.close()
            raise

    @property
    def num_bytes(self) -> int:
        return sum(share.layout.num_bytes for share in self.shares)

    @property
    def traffic(self) -> Traffic:
        """Bytes to and from all workers."""
        return sum((share.channel.traffic for share in self.shares), Traffic())

    def alive(self) -> list[WorkerShare]:
        """Returns the shares whose workers are there."""
        return [share for share in self.shares if share.lost is None]

    def open(self, spans: Spans) -> "RemotePages":
        # A slot is free again when nobody can use its launch any more.
        slot = self._slots.pop()
        pages = RemotePages(self.shares, self.groups, spans, slot)
        finalize(pages, self._slots.append, slot)
        return pages

    def lost_shares(self) -> Mapping[int, str]:
        count, told = len(self.shares), dict[int, str]()
        for share in self.shares:
            if share.lost is not None:
                text = f"attention worker {share.number + 1} of {count} ({share.name}) is lost ({share.lost})"
                if self.split == "rows":
                    told[share.number] = f"{text}; it held the keys of this sequence, others go on"
                else:
                    told.setdefault(0, f"{text}; it held {_told_heads(share.heads)} of all sequences, which end")
        return told

    def copy_out(self, place: int, pages: Sequence[int]) -> tuple[Tensor, ...]:
        layout, depths = self.shares[0].layout, self._depths[place]
        size = layout.page_size, layout.head_dim
        made = [len(self._blueprint.made_heads(depth)) for depth in depths]
        whole = [torch.zeros(len(pages), heads, *size, dtype=layout.dtype) for heads in made * 2]
        for share in self._holders(place, pages):
            own = self._own_planes(share, place)
            sizes = [len(pages) * (heads.stop - heads.start) * size[0] * size[1] for _, heads in own]
            try:
                answer = share.channel.expect((sum(sizes),), layout.dtype, 0)
                self._tell(share, Message.COPY_OUT, place, pages)
                pieces = answer.wait("pages").cpu().split(sizes)
            except ChannelLost as error:
                share.lose(error)
                continue
            for piece, (plane, heads) in zip(pieces, own, strict=True):
                whole[plane][:, heads] = piece.view(len(pages), -1, *size)
        return tuple(whole)

    def copy_in(self, place: int, pages: Sequence[int], copies: Sequence[Tensor]) -> None:
        for share in self._holders(place, pages):
            pieces = [copies[plane][:, heads].reshape(-1) for plane, heads in self._own_planes(share, place)]
            self._tell(share, Message.COPY_IN, place, pages, torch.cat(pieces))

    def wipe(self, place: int, pages: Sequence[int]) -> None:
        for share in self._holders(place, pages):
            self._tell(share, Message.WIPE, place, pages)

    def keep_prefix(self, depth: int, adapters: int, made: KeyValue) -> None:
        for share in self.alive():
            both = torch.stack([each[:, share.heads.start : share.heads.stop] for each in made])
            header = (Message.PREFIX, depth, both.shape[2], both.shape[3], adapters)
            share.send(header, "pages", both.to(share.layout.dtype))

    def close(self) -> None:
        for share in self.shares:
            share.send((Message.CLOSE,))
            share.lost = share.lost or "the engine is closed"
        if self._started is not None:
            self._started.close()

    def _holders(self, place: int, pages: Sequence[int]) -> list[WorkerShare]:
        """Returns the living shares that hold something of the pages, all of which belong to one row."""
        if not pages:
            return []
        if self.split == "heads":
            return [share for share in self.alive() if share.layout.planes[place]]
        number = pages[0] // self.groups[place].share_pages
        return [share for share in self.alive() if share.number == number]

    def _own_planes(self, share: WorkerShare, place: int) -> list[tuple[int, slice]]:
        """Returns the planes of a group of which a share holds heads, and these heads."""
        depths = self._depths[place]
        own = [at for at, depth in enumerate(depths) if depth in share.layout.planes[place]]
        heads = [share.made[depths[at]] for at in own]
        return [(kind * len(depths) + at, each) for kind in (0, 1) for at, each in zip(own, heads, strict=True)]

    def _tell(self, share: WorkerShare, kind: Message, place: int, pages: Sequence[int], *tensors: Tensor) -> None:
        index = torch.tensor(pages, dtype=torch.int64) - share.first_page(self.groups[place])
        share.send((kind, place, len(pages)), "pages", index, *tensors)


def join_worker(address: str, layout: KeyLayout, device: torch.device, timeout: timedelta) -> Channel:
    """Reserves room in a worker and opens the channel to it.

    Args:
        address: Of the worker.
        layout: Of the pages that it shall hold.
        device: Of this process.
        timeout: Longest wait for the worker.

    Raises:
        RefoldError: No worker listens there, another engine uses it, or it has no room.
    """
    host, port = read_address(address)
    try:
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        own = dist.PrefixStore(f"session{store.add('sessions', 1)}", store)
        own.set("device", device.type)
        own.set("layout", layout.to_json())
        deadline = time.monotonic() + timeout.total_seconds()
        while not own.check(["answer"]):
            if time.monotonic() > deadline:
                own.set("gone", "")
                raise RefoldError(
                    f"attention_workers: a worker without an engine is required (the one at {address} serves another); "
                    f"close that engine, or start a further worker"
                )
            time.sleep(POLL)
        told = json.loads(own.get("answer"))
        if "error" in told:
            raise RefoldError(f"attention_workers: the worker at {address} refuses: {told['error']}")
        both_cuda = device.type == told["device"] == "cuda"
        return open_channel(own, MODEL, own_address(host, port), device, timeout, both_cuda)
    except (RuntimeError, ChannelLost) as error:
        raise RefoldError(
            f"attention_workers: a worker that listens at {address} is required (got: {str(error).splitlines()[0]}); "
            f"start it with `refold worker --address {address}`"
        ) from error


def _told_heads(heads: range) -> str:
    return f"head {heads.start}" if len(heads) == 1 else f"heads {heads.start} to {heads.stop - 1}"
