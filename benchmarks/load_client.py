"""A client of HTTP that costs little: connections on raw sockets, whose bytes are parsed after the clock stops."""

import asyncio
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

LAST_CHUNK = b"0\r\n\r\n"


class Read(NamedTuple):
    """Bytes as they came.

    Attributes:
        at: `time.perf_counter` when they came.
        data: The bytes.
    """

    at: float
    data: bytes


@dataclass
class Heard:
    """The answer to one request, with its times.

    Attributes:
        begun: `time.perf_counter` when the request was sent.
        reads: What came, as it came.
        is_whole: Whether the answer came to its end.
        failure: Why it did not: `closed`, `refused`, `left` (by the client itself); empty: nothing failed.
    """

    begun: float = 0.0
    reads: list[Read] = field(default_factory=list)
    is_whole: bool = False
    failure: str = ""

    @property
    def seconds(self) -> float:
        """Time until the last byte."""
        return self.reads[-1].at - self.begun if self.reads else 0.0

    @property
    def status(self) -> int:
        """Status of the answer; 0: none came."""
        first = self._head().partition(b"\r\n")[0].split(b" ")
        return int(first[1]) if len(first) > 1 else 0

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer, by their names in small letters."""
        lines = self._head().decode("latin-1").split("\r\n")[1:]
        return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    @property
    def body(self) -> bytes:
        """Body of the answer, as far as it came."""
        return b"".join(data for _, data in self.pieces())

    def json(self) -> Any:
        """Returns the body as JSON; None where it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    def pieces(self) -> list[Read]:
        """Returns the body in pieces, each with the time at which it was complete."""
        raw = b"".join(each.data for each in self.reads)
        head, separator, _ = raw.partition(b"\r\n\r\n")
        if not separator:
            return []
        place = len(head) + 4
        if self.headers.get("transfer-encoding") != "chunked":
            return [Read(self.reads[-1].at, raw[place:])]
        pieces, clock = [], _Clock(self.reads)
        while (end := raw.find(b"\r\n", place)) >= 0:
            size = int(raw[place:end].partition(b";")[0], 16)
            start, stop = end + 2, end + 2 + size
            if size == 0 or stop > len(raw):
                break
            pieces.append(Read(clock.at(stop), raw[start:stop]))
            place = stop + 2
        return pieces

    @property
    def head_bytes(self) -> int:
        """Bytes before the body."""
        return len(self._head()) + 4

    def _head(self) -> bytes:
        return b"".join(each.data for each in self.reads[:8]).partition(b"\r\n\r\n")[0]


class _Clock:
    """Finds the time at which a byte came; places must rise."""

    def __init__(self, reads: list[Read]):
        self._reads, self._number, self._end = reads, 0, len(reads[0].data)

    def at(self, place: int) -> float:
        while self._end < place:
            self._number += 1
            self._end += len(self._reads[self._number].data)
        return self._reads[self._number].at


@dataclass
class Told:
    """A generated answer as it was told.

    Attributes:
        texts: Text of each choice.
        reasons: Why each choice ended.
        times: Times of the pieces of each choice, in a stream.
        tokens: Token ids of each choice, where they were asked for.
        usage: Numbers of tokens; empty: none were told.
        error: The error object; None: there is none.
        is_done: Whether a stream ended with `[DONE]`, or the answer was one object.
    """

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    times: dict[int, list[float]] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    is_done: bool = False

    def take(self, data: Mapping[str, Any], at: float) -> None:
        """Takes one object: a chunk, or a whole answer."""
        if "error" in data:
            self.error = data["error"]
            return
        self.usage = data.get("usage") or self.usage
        for choice in data["choices"]:
            index = choice["index"]
            message = choice.get("delta") or choice.get("message")
            text = choice.get("text", "") if message is None else message.get("content") or ""
            self.texts[index] = self.texts.get(index, "") + text
            self.times.setdefault(index, []).append(at)
            if choice["finish_reason"] is not None:
                self.reasons[index] = choice["finish_reason"]
            ids = [each["id"] for each in choice.get("refold_tokens") or () if each["id"] is not None]
            self.tokens.setdefault(index, []).extend(ids)


def read_told(heard: Heard) -> Told:
    """Returns what an answer tells.

    Raises:
        ValueError: It has another form.
    """
    told = Told()
    if not heard.headers.get("content-type", "").startswith("text/event-stream"):
        if heard.is_whole:
            told.take(json.loads(heard.body), heard.reads[-1].at)
            told.is_done = True
        return told
    rest = b""
    for at, data in heard.pieces():
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            if not event.startswith(b"data: "):
                raise ValueError(f"an event of data is required (got {event[:80]!r})")
            if event == b"data: [DONE]":
                told.is_done = True
            else:
                told.take(json.loads(event[6:]), at)
    if rest and heard.is_whole:
        raise ValueError(f"a stream of whole events is required (it ends with {rest[:80]!r})")
    return told


@dataclass(frozen=True)
class Manner:
    """How a client treats the connection of one request.

    Attributes:
        leave_after: Reads after which it closes the connection; None: it stays.
        abort_at: Seconds after which it resets the connection, whatever has come; None: never.
        send_share: Share of the request that it sends before it leaves without the rest.
        pause: Seconds that it waits after each read before it reads on.
    """

    leave_after: int | None = None
    abort_at: float | None = None
    send_share: float = 1.0
    pause: float = 0.0


PATIENT = Manner()


class Wire(asyncio.Protocol):
    """One connection, for one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._heard: Heard | None = None
        self._manner = PATIENT
        self._ended: asyncio.Future[None] | None = None
        self._size: int | None = None
        """Bytes of the answer; -1: chunks tell; None: the headers have not come."""

    @property
    def is_open(self) -> bool:
        """Whether another request may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, manner: Manner = PATIENT) -> Heard:
        """Sends a request and returns what comes."""
        assert self._transport is not None
        loop = asyncio.get_running_loop()
        self._heard = heard = Heard(time.perf_counter())
        self._manner, self._ended, self._size = manner, loop.create_future(), None
        timer = None if manner.abort_at is None else loop.call_later(manner.abort_at, self._abort)
        self._transport.write(request[: round(len(request) * manner.send_share)])
        try:
            await self._ended
        finally:
            if timer is not None:
                timer.cancel()
        return heard

    def close(self) -> None:
        """Closes the connection."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes the connection."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Keeps what comes, with its time."""
        heard, ended = self._heard, self._ended
        if heard is None or ended is None or ended.done():
            return
        heard.reads.append(Read(time.perf_counter(), data))
        if self._is_end(heard, data):
            heard.is_whole = True
            if heard.headers.get("connection") == "close":
                self.close()
            ended.set_result(None)
        elif self._manner.leave_after is not None and len(heard.reads) >= self._manner.leave_after:
            self._leave()
        elif self._manner.pause:
            assert self._transport is not None
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(self._manner.pause, self._read_on)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends a request that is open."""
        if self._ended is not None and not self._ended.done():
            assert self._heard is not None
            self._heard.failure = "reset" if isinstance(exc, ConnectionError) else "closed"
            self._ended.set_result(None)

    def _is_end(self, heard: Heard, data: bytes) -> bool:
        if self._size is None:
            if b"\r\n\r\n" not in b"".join(each.data for each in heard.reads):
                return False
            headers = heard.headers
            is_chunked = headers.get("transfer-encoding") == "chunked"
            self._size = -1 if is_chunked else heard.head_bytes + int(headers.get("content-length", 0))
        if self._size < 0:
            # An event never ends like this, so a look at the end is enough.
            tail = data if len(data) >= len(LAST_CHUNK) else b"".join(each.data for each in heard.reads[-5:])
            return tail.endswith(LAST_CHUNK)
        return sum(len(each.data) for each in heard.reads) >= self._size

    def _leave(self) -> None:
        assert self._heard is not None
        assert self._ended is not None
        self._heard.failure = "left"
        self.close()
        self._ended.set_result(None)

    def _abort(self) -> None:
        if self._ended is not None and not self._ended.done():
            assert self._heard is not None
            assert self._transport is not None
            self._heard.failure = "left"
            self._transport.abort()
            self._ended.set_result(None)

    def _read_on(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


async def connect(address: tuple[str, int], receive_bytes: int | None = None) -> Wire:
    """Opens a connection.

    Args:
        address: Host and port.
        receive_bytes: Bytes that the system keeps for a client that does not read; None: its default.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setblocking(False)
    if receive_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    _, wire = await loop.create_connection(Wire, sock=sock)
    return wire


def make_request(
    method: str, path: str, body: bytes | Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """Returns the bytes of a request; an object as body becomes JSON."""
    sent = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    told = {"host": "localhost", "accept": "*/*"}
    if body is not None:
        told |= {"content-type": "application/json", "content-length": str(len(sent))}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in (told | dict(headers or {})).items())]
    return "\r\n".join([*lines, "", ""]).encode() + sent


async def ask(address: tuple[str, int], request: bytes, manner: Manner = PATIENT) -> Heard:
    """Sends a request on a connection of its own and returns what comes."""
    wire = await connect(address)
    try:
        return await wire.exchange(request, manner)
    finally:
        wire.close()
