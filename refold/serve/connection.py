"""Connections of clients: uvicorn's HTTP/1.1 protocol with bounds on time, on headers and on their number."""

import asyncio
import json
import resource
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from refold.serve.faults import ApiFault, new_request_id
from refold.serve.settings import ServeSettings

MOST_HEADER_BYTES = 32 * 1024
MOST_HEADERS = 100
MOST_CONNECTIONS = 1_000
"""Open connections; fewer where the system allows fewer files."""
SPARE_FILES = 64
"""Files that are left for everything else."""
SWEEP_SECONDS = 0.5
LINGER_SECONDS = 2.0
"""Time in which a client that still sends can read its answer."""
MOST_DROPPED = 16 * 2**20
"""Bytes of such a client that are read and dropped."""


class CountedTransport:
    """A transport that counts the bytes its client has taken, and that closes gently.

    A socket that is closed while bytes of the client are unread resets the connection, and the client may lose the
    answer. So while a request is coming, `close` ends only our side and drops what comes for a while.

    Args:
        transport: The transport.
        is_reading: Says whether a request is coming.
    """

    def __init__(self, transport: asyncio.Transport, is_reading: Callable[[], bool]):
        self._transport, self._is_reading = transport, is_reading
        self._num_written = 0
        self.lingers_until: float | None = None

    def write(self, data: bytes) -> None:
        """Writes bytes, without waiting."""
        self._num_written += len(data)
        self._transport.write(data)

    @property
    def num_taken(self) -> int:
        """Bytes that have left this process."""
        return self._num_written - self._transport.get_write_buffer_size()

    def is_closing(self) -> bool:
        """Says whether nothing more is written."""
        return self.lingers_until is not None or self._transport.is_closing()

    def close(self) -> None:
        """Closes the connection when all is written."""
        if self.is_closing():
            return
        if not self._is_reading():
            self._transport.close()
            return
        self.lingers_until = time.monotonic() + LINGER_SECONDS
        self._transport.write_eof()
        self._transport.resume_reading()

    def finish(self) -> None:
        """Closes the connection without waiting for its client to end."""
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class BoundedConnection(H11Protocol):
    """A connection that costs bounded time and memory, whatever its client does.

    uvicorn bounds neither the time of headers and bodies nor that of answers that are not read. `look` is called from
    time to time. h11 is taken because it is pure Python, comes with uvicorn everywhere, and says what state a
    connection is in. Answers to broken requests have the form of all other errors.
    """

    settings: ServeSettings

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._counted = CountedTransport(transport, self._is_reading)
        self._reading_since: float | None = time.monotonic()
        self._num_taken, self._taken_at = 0, time.monotonic()
        self._num_dropped = 0
        super().connection_made(self._counted)  # type: ignore[arg-type]
        if len(self.connections) > most_connections():
            self._reading_since = None
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "server: too many connections are open; try again", retry=1)

    def data_received(self, data: bytes) -> None:
        # h11 looks at the size of headers only where more is to come, so it gets no more than that size at a time.
        for start in range(0, len(data), MOST_HEADER_BYTES):
            if self._counted.is_closing():
                self._num_dropped += len(data) - start
                if self._num_dropped > MOST_DROPPED:
                    self._counted.finish()
                return
            super().data_received(data[start : start + MOST_HEADER_BYTES])
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._reading_since = self._reading_since or time.monotonic()
        else:
            self._reading_since = None

    def look(self, now: float) -> None:
        """Ends the connection if its client is too slow."""
        settings, counted = self.settings, self._counted
        if counted.lingers_until is not None and now > counted.lingers_until:
            counted.finish()
        elif self._reading_since is not None and now - self._reading_since > settings.read_seconds:
            self._refuse(
                HTTPStatus.REQUEST_TIMEOUT,
                f"request: it must come within {settings.read_seconds:g} s, headers and body",
            )
            self._reading_since = None
        taken = counted.num_taken
        if taken > self._num_taken or not counted.get_write_buffer_size():
            self._num_taken, self._taken_at = taken, now
        elif now - self._taken_at > settings.write_seconds:
            counted.abort()

    def send_400_response(self, msg: str) -> None:
        """Answers a request that is no HTTP."""
        if len(self.conn.trailing_data[0]) > MOST_HEADER_BYTES:
            self._refuse(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"headers: must be at most {MOST_HEADER_BYTES} bytes and {MOST_HEADERS} lines",
            )
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, "request: valid HTTP/1.1 is required")

    def _is_reading(self) -> bool:
        state = self.conn.their_state
        return state in (h11.SEND_BODY, h11.ERROR) or (state is h11.IDLE and self._reading_since is not None)

    def _refuse(self, status: HTTPStatus, message: str, retry: int | None = None) -> None:
        """Answers with an error if no answer has begun, and closes the connection."""
        cycle = self.cycle
        is_open = cycle is not None and not cycle.response_complete
        # After an answer, h11 is idle again only when the next request may come.
        may_answer = self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not (is_open and cycle.response_started)
        if is_open:
            # The application sees a client that is gone.
            cycle.disconnected = True
            cycle.message_event.set()
        if may_answer and not self._counted.is_closing():
            self._counted.write(_error_answer(status, message, retry))
        self._counted.close()


def most_connections() -> int:
    """Returns the number of connections that may be open at once."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_CONNECTIONS if files == resource.RLIM_INFINITY else max(1, min(MOST_CONNECTIONS, files - SPARE_FILES))


def bounded(settings: ServeSettings) -> type[BoundedConnection]:
    """Returns the class of connections with some settings."""
    return type("BoundedConnection", (BoundedConnection,), {"settings": settings})


def refuse_odd_headers(app: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an application that itself answers requests with too many headers, or with two ends of the body."""

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and len(scope["headers"]) > MOST_HEADERS:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            await _refuse_scope(send, status, f"headers: must be at most {MOST_HEADERS} (got {len(scope['headers'])})")
            return
        names = {name for name, _ in scope["headers"]} if scope["type"] == "http" else set()
        if {b"transfer-encoding", b"content-length"} <= names:
            # Another server on the way may read another end of the body (RFC 9112, section 6.3).
            message = "headers: either content-length or transfer-encoding is required (got both)"
            await _refuse_scope(send, HTTPStatus.BAD_REQUEST, message)
            return
        await app(scope, receive, send)

    return guarded


async def _refuse_scope(send: Any, status: HTTPStatus, message: str) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"connection", b"close"),
        (b"x-request-id", new_request_id().encode()),
    ]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": _error_body(status, message)})


def _error_body(status: HTTPStatus, message: str) -> bytes:
    return json.dumps(ApiFault(status, message, code=status.name.lower()).body()).encode()


def _error_answer(status: HTTPStatus, message: str, retry: int | None) -> bytes:
    body = _error_body(status, message)
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        f"x-request-id: {new_request_id()}",
        *([] if retry is None else [f"retry-after: {retry}"]),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
