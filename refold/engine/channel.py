"""Channels between a model worker and an attention worker: numbers and tensors over torch.distributed, nothing else."""

import os
import socket
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from refold.errors import RefoldError

MODEL, WORKER = 0, 1
"""Ranks of the two ends."""
HEADER = 32
"""Numbers of the message that stands before each payload."""
MAX_PARTS = 7
"""The most parts of a launch that one message names."""
MAX_PENDING = 64
"""Messages that may be on their way before the sender waits for the oldest."""
REQUESTS, ANSWERS = 0, 1
"""Tags of messages to the attention worker, and back; each launch adds its slot to the second."""
FOREVER = timedelta(days=3650)


class Message(IntEnum):
    """The request of a message: the first number of its header."""

    CLOSE = 0
    OPEN = 1
    APPEND = 2
    ATTEND = 3
    COPY_OUT = 4
    COPY_IN = 5
    WIPE = 6
    PREFIX = 7


class ChannelLost(Exception):
    """The other end is gone, or has not answered in time."""


@dataclass
class Traffic:
    """Bytes over channels, both directions together.

    Attributes:
        queries: Of queries.
        heads: Of the outputs of attention.
        keys: Of keys and values of new tokens.
        control: Of headers, positions and block tables.
        pages: Of pages that were copied out or in, and of prefixes.
    """

    queries: int = 0
    heads: int = 0
    keys: int = 0
    control: int = 0
    pages: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in Traffic.__dataclass_fields__))


class _Sent(NamedTuple):
    work: Any
    tensor: Tensor


@dataclass
class Channel:
    """One end of a pair of processes.

    Attributes:
        control: Group of both ends on the hosts' network, for headers.
        bulk: Group for payloads; the same one unless both ends have CUDA devices.
        peer: Rank of the other end.
        device: Where payloads are sent from and received.
        timeout: Longest wait for the other end.
        traffic: Bytes so far.
    """

    control: Any
    bulk: Any
    peer: int
    device: torch.device
    timeout: timedelta
    traffic: Traffic = field(default_factory=Traffic)
    _pending: "deque[_Sent]" = field(default_factory=deque)
    _num_sent: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    def send(self, header: Sequence[int], kind: str = "control", *tensors: Tensor) -> None:
        """Sends a header and tensors, without a wait for their arrival.

        Args:
            header: At most `HEADER` numbers.
            kind: Entry of the traffic that the tensors count for.
            tensors: Payloads; the header tells the other end their sizes.

        Raises:
            ChannelLost: The other end is gone.
        """
        numbers = torch.zeros(HEADER, dtype=torch.int64)
        numbers[: len(header)] = torch.tensor(list(header), dtype=torch.int64)
        with self._lock:
            self._send(self.control, numbers, "control", REQUESTS)
            for tensor in tensors:
                self._send(self.bulk, tensor, kind, REQUESTS)
            self._settle(self._num_sent - MAX_PENDING)

    def expect(self, shape: Sequence[int], dtype: torch.dtype, slot: int) -> "Answer":
        """Begins to wait for a tensor that answers the last message of a slot."""
        found = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        try:
            with self._lock:
                mark = torch.zeros(1, dtype=torch.int64) if self.bulk is not self.control else None
                expected = _flat(found) if mark is None else mark
                work = self.control.recv([expected], self.peer, ANSWERS + slot)
                return Answer(self, found, work, slot, self._num_sent)
        except RuntimeError as error:
            raise ChannelLost(_short(error)) from error

    def answer(self, tensor: Tensor, slot: int) -> None:
        """Sends a tensor that the other end expects."""
        if self.bulk is not self.control:
            self._send(self.control, torch.zeros(1, dtype=torch.int64), "control", ANSWERS + slot)
        self._send(self.bulk, tensor, "heads", ANSWERS + slot)
        self._settle(self._num_sent - MAX_PENDING)

    def next_header(self) -> list[int]:
        """Waits for the next header as long as the other end lives, and returns its numbers."""
        numbers = torch.zeros(HEADER, dtype=torch.int64)
        try:
            self._wait(self.control.recv([numbers], self.peer, REQUESTS), FOREVER)
        except RuntimeError as error:
            raise ChannelLost(_short(error)) from error
        return numbers.tolist()

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Waits for the next payload behind a header."""
        found = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        try:
            work = self.bulk.recv([_flat(found)], self.peer, REQUESTS)
        except RuntimeError as error:
            raise ChannelLost(_short(error)) from error
        self._wait(work, self.timeout)
        return found

    def _send(self, group: Any, tensor: Tensor, kind: str, tag: int) -> None:
        tensor = tensor.to(self.device if group is self.bulk else "cpu").contiguous()
        if not tensor.numel():
            return
        setattr(self.traffic, kind, getattr(self.traffic, kind) + tensor.nbytes)
        try:
            self._pending.append(_Sent(group.send([_flat(tensor)], self.peer, tag), tensor))
            self._num_sent += 1
        except RuntimeError as error:
            raise ChannelLost(_short(error)) from error

    def finish(self, answer: "Answer", kind: str) -> None:
        """Waits for an answer; see `Answer.wait`."""
        self._wait(answer.work, self.timeout)
        if self.bulk is not self.control:
            self._wait(self.bulk.recv([_flat(answer.tensor)], self.peer, ANSWERS + answer.slot), self.timeout)
        with self._lock:
            # The other end has read all messages before its answer.
            self._settle(answer.num_sent)
            setattr(self.traffic, kind, getattr(self.traffic, kind) + answer.tensor.nbytes)

    def _settle(self, num_sent: int) -> None:
        """Waits until so many messages have left, and lets their tensors go."""
        while self._pending and self._num_sent - len(self._pending) < num_sent:
            self._wait(self._pending.popleft().work, self.timeout)

    def _wait(self, work: Any, timeout: timedelta) -> None:
        try:
            work.wait(timeout)
        except RuntimeError as error:
            raise ChannelLost(_short(error)) from error


class Answer(NamedTuple):
    """A tensor that is on its way.

    Attributes:
        channel: Over which it comes.
        tensor: To be filled.
        work: Ends when it is filled, or announced.
        slot: Of the launch.
        num_sent: Number of messages before it.
    """

    channel: Channel
    tensor: Tensor
    work: Any
    slot: int
    num_sent: int

    def wait(self, kind: str = "heads") -> Tensor:
        """Returns the tensor when it has come.

        Args:
            kind: Entry of the traffic that it counts for.

        Raises:
            ChannelLost: The other end is gone, or does not answer in time.
        """
        self.channel.finish(self, kind)
        return self.tensor


def open_channel(
    store: Any, rank: int, host: str, device: torch.device, timeout: timedelta, both_cuda: bool
) -> Channel:
    """Joins the other end, which calls this function too.

    Args:
        store: Key-value store of torch.distributed that both ends reach.
        rank: `MODEL` or `WORKER`.
        host: Address of this end, by which the other one reaches it.
        device: Of this end.
        timeout: Longest wait for the other end.
        both_cuda: Whether both ends have CUDA devices; payloads then go by NCCL.
    """
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]  # type: ignore[attr-defined]
    options._timeout = timeout
    try:
        control = bulk = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, 2, options)
        if both_cuda:
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
            nccl = dist.ProcessGroupNCCL.Options()  # type: ignore[attr-defined]
            nccl._timeout = timeout
            bulk = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, 2, nccl)  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise ChannelLost(_short(error)) from error
    return Channel(control, bulk, 1 - rank, device if both_cuda else torch.device("cpu"), timeout)


def read_address(address: str) -> tuple[str, int]:
    """Returns host and port of an address.

    Raises:
        RefoldError: It is no address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise RefoldError(f"address: HOST:PORT is required (got {address!r})")
    return host.strip("[]"), int(port)


def own_address(host: str, port: int) -> str:
    """Returns the address of this host's interface from which another host is reached."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # A datagram socket sends nothing when it connects; it only chooses its interface.
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise RefoldError(f"address: a host that can be reached is required (got {host!r}: {error})") from error


def _flat(tensor: Tensor) -> Tensor:
    """Returns the bytes of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8)


def _short(error: Exception) -> str:
    """Returns the first sentence of a transport's error, without the place in its source."""
    text = str(error).split("] ", 1)[-1] if str(error).startswith("[") else str(error)
    return text.split(". ")[0].split("\n")[0]
