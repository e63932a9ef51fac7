"""Attention workers: processes that hold shares of an engine's pages and compute attention for it.

A worker executes nothing that comes over the wire: it reads numbers, tensors and one JSON object of sizes.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist

from refold.engine.channel import (
    MAX_PARTS,
    WORKER,
    Channel,
    ChannelLost,
    Message,
    open_channel,
    read_address,
)
from refold.engine.key_layout import KeyLayout
from refold.engine.page_keeper import LocalKeeper, LocalPages
from refold.engine.page_plan import Spans
from refold.engine.pages import PageGroup
from refold.errors import RefoldError
from refold.nn.mixers.store import StorePart

SLOTS = 64
"""Launches whose positions a worker remembers at most; their numbers are used again."""
JOINING = timedelta(seconds=60)
"""Longest wait for an engine that has announced itself."""
POLL = 0.02


def serve(
    address: str,
    *,
    device: str = "cpu",
    threads: int | None = None,
    once: bool = False,
    owned: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Serves one engine after the other.

    Args:
        address: HOST:PORT to listen at, by which engines reach this host; port 0: a free one.
        device: Of keys and values.
        threads: CPU threads of attention; None: as torch is set.
        once: Whether to end after the first engine.
        owned: Whether to end when standard input closes, because the process that started this one has ended.
        say: Is told the address, with the port, when engines can come.

    Raises:
        RefoldError: The address cannot be listened at.
    """
    host, port = read_address(address)
    if threads is not None:
        torch.set_num_threads(threads)
    if owned:
        threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        # A socket of our own, because the store would listen at all interfaces.
        listening = socket.create_server((host, port))
    except OSError as error:
        raise RefoldError(f"address: a free port of this host is required (got {address!r}: {error})") from error
    port = listening.getsockname()[1]
    store = dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach(), timeout=JOINING
    )
    say(f"{host}:{port}")
    for number in count(1):
        own = dist.PrefixStore(f"session{number}", store)
        if not _comes(store, own, number):
            continue
        _serve_one(own, host, torch.device(device))
        if once:
            return


def _comes(store: Any, own: Any, number: int) -> bool:
    """Waits for the next engine; says whether it is still there."""
    deadline: float | None = None
    while not own.check(["layout"]):
        if deadline is None and store.add("sessions", 0) >= number:
            deadline = time.monotonic() + JOINING.total_seconds()
        if deadline is not None and time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return not own.check(["gone"])


def _serve_one(store: Any, host: str, device: torch.device) -> None:
    """Serves one engine until it ends."""
    try:
        keeper = _make_keeper(KeyLayout.from_json(store.get("layout")), device)
    except (RefoldError, RuntimeError, MemoryError) as error:
        store.set("answer", json.dumps({"error": str(error).split("\n")[0]}))
        return
    store.set("answer", json.dumps({"device": device.type}))
    both_cuda = device.type == "cuda" and store.get("device") == b"cuda"
    try:
        channel = open_channel(store, WORKER, host, device, JOINING, both_cuda)
        Session(keeper, channel).run()
    except ChannelLost:
        # The engine has ended, in whatever way. Its pages go with it.
        return
    except (ValueError, LookupError, AssertionError, RuntimeError, MemoryError) as error:
        # A message that makes no sense, or no memory for it: this session ends, not the worker.
        print(f"worker: the session is ended ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
    finally:
        keeper.close()


def _make_keeper(layout: KeyLayout, device: torch.device) -> LocalKeeper:
    sizes = zip(layout.windows, layout.num_pages, strict=True)
    groups = [PageGroup(window, pages, layout.page_size, layout.max_rows) for window, pages in sizes]
    return LocalKeeper(layout, groups, device)


class Session:
    """One engine's use of a worker.

    Args:
        keeper: Its pages.
        channel: To the engine.
    """

    def __init__(self, keeper: LocalKeeper, channel: Channel):
        self._keeper, self._layout, self._channel = keeper, keeper.layout, channel
        self._launches: dict[int, tuple[LocalPages, Spans]] = {}

    @torch.inference_mode()
    def run(self) -> None:
        """Answers messages until the engine closes the session.

        Raises:
            ChannelLost: The engine is gone.
        """
        while True:
            header = self._channel.next_header()
            kind = header[0]
            if kind == Message.CLOSE:
                return
            _DOES[Message(kind)](self, header)

    def _open(self, header: list[int]) -> None:
        _, slot, num_spans, flat, size = header[:5]
        numbers = self._channel.receive((size,), torch.int64).cpu().numpy()
        rows, starts, lengths = numbers[: 3 * num_spans].reshape(3, num_spans)
        at = 3 * num_spans
        for group in self._keeper.groups:
            count = int(numbers[at])
            changed = numbers[at + 1 : at + 1 + 3 * count].reshape(3, count)
            at += 1 + 3 * count
            if count:
                group.widen(int(changed[1].max()) + 1)
                group.tables[changed[0], changed[1]] = changed[2]
        spans = Spans(rows, starts, lengths, bool(flat))
        self._launches[slot] = self._keeper.open(spans), spans

    def _append(self, header: list[int]) -> None:
        pages, spans, parts = self._launch(header)
        layout = self._layout
        num_heads = layout.planes[layout.groups[parts[0][0]]][parts[0][0]]
        given = self._channel.receive((2, *_shape(spans, parts), num_heads, layout.head_dim), layout.dtype)
        key, value = given.transpose(2, 3)
        pages.append(parts, key, value)

    def _attend(self, header: list[int]) -> None:
        pages, spans, parts = self._launch(header)
        layout = self._layout
        query = self._channel.receive((*_shape(spans, parts), header[3], layout.head_dim), layout.dtype)
        self._channel.answer(pages.attend(parts, query.transpose(1, 2)), header[1])

    def _launch(self, header: list[int]) -> tuple[LocalPages, Spans, list[StorePart]]:
        """Returns the launch of a message, and its depths with their rows."""
        _, slot, num_parts = header[:3]
        assert num_parts <= MAX_PARTS
        numbers = zip(*[iter(header[4 : 4 + 4 * num_parts])] * 4, strict=True)
        parts = [StorePart(depth, slice(begin, end), adapters) for depth, begin, end, adapters in numbers]
        return *self._launches[slot], parts

    def _copy_out(self, header: list[int]) -> None:
        place, pages = self._pages(header)
        copies = self._keeper.copy_out(place, pages)
        if copies:
            self._channel.answer(torch.cat([copy.view(-1) for copy in copies]), 0)

    def _copy_in(self, header: list[int]) -> None:
        place, pages = self._pages(header)
        layout = self._layout
        heads = list(layout.planes[place].values()) * 2
        sizes = [len(pages) * count * layout.page_size * layout.head_dim for count in heads]
        if not sum(sizes):
            return
        given = self._channel.receive((sum(sizes),), layout.dtype).split(sizes)
        shapes = [(len(pages), count, layout.page_size, layout.head_dim) for count in heads]
        self._keeper.copy_in(place, pages, [each.view(shape) for each, shape in zip(given, shapes, strict=True)])

    def _wipe(self, header: list[int]) -> None:
        self._keeper.wipe(*self._pages(header))

    def _pages(self, header: list[int]) -> tuple[int, list[int]]:
        _, place, count = header[:3]
        return place, self._channel.receive((count,), torch.int64).tolist()

    def _prefix(self, header: list[int]) -> None:
        _, depth, num_heads, length, adapters = header[:5]
        given = self._channel.receive((2, 1, num_heads, length, self._layout.head_dim), self._layout.dtype)
        self._keeper.keep_prefix(depth, adapters, (given[0], given[1]))


# No mapping of the session's own: it would refer to itself, and its connection would outlive it.
_DOES: dict[Message, Callable[[Session, list[int]], None]] = {
    Message.OPEN: Session._open,
    Message.APPEND: Session._append,
    Message.ATTEND: Session._attend,
    Message.COPY_OUT: Session._copy_out,
    Message.COPY_IN: Session._copy_in,
    Message.WIPE: Session._wipe,
    Message.PREFIX: Session._prefix,
}


def _shape(spans: Spans, parts: list[StorePart]) -> tuple[int, int]:
    """Returns rows and tokens of each row of some neighbouring parts of a launch."""
    num_rows = parts[-1][1].stop - parts[0][1].start
    return num_rows, 1 if spans.flat else int(spans.lengths[0])


def _end_with_input() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)
