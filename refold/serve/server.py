"""The HTTP server: uvicorn with bounded connections, which lets open requests end when it is told to stop."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import uvicorn

from refold.errors import RefoldError
from refold.serve.connection import MOST_HEADER_BYTES, SWEEP_SECONDS, BoundedConnection, bounded, refuse_odd_headers
from refold.serve.line_log import LineLog
from refold.serve.process_link import ProcessLink
from refold.serve.settings import ServeSettings

BACKLOG = 1024
KEEP_ALIVE_SECONDS = 30
"""Time in which an idle connection must send its next request."""
LAST_SECONDS = 2.0
"""Time that requests have to tell their clients that the server stops."""
MOST_PATH = 200
"""Characters of a path in the log."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

logger = logging.getLogger("refold.serve")


class HttpServer(uvicorn.Server):
    """A server for one application, whose signals are handled elsewhere.

    Args:
        app: The application.
        settings: Bounds.
    """

    def __init__(self, app: Callable[..., Any], settings: ServeSettings):
        guarded = refuse_odd_headers(app)
        config = uvicorn.Config(
            log_requests(guarded) if logger.isEnabledFor(logging.DEBUG) else guarded,
            http=bounded(settings),
            loop="asyncio",
            ws="none",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            backlog=BACKLOG,
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        )
        # A number with a fraction is as good.
        config.timeout_graceful_shutdown = cast("int", settings.drain_seconds + LAST_SECONDS)
        super().__init__(config)
        self.settings = settings

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """Leaves signals alone."""
        yield

    async def sweep(self) -> None:
        """Looks at all connections from time to time, for ever."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = time.monotonic()
            for each in list(self.server_state.connections):
                if isinstance(each, BoundedConnection):
                    each.look(now)


def log_requests(app: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an application that logs a line for each request: its id, route, status and time."""

    async def logged(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        begun, told = time.monotonic(), {"status": 0, "id": "-"}

        async def noted(message: Any) -> None:
            if message["type"] == "http.response.start":
                told["status"] = message["status"]
                told["id"] = dict(message.get("headers", ())).get(b"x-request-id", b"-").decode("latin-1")
            await send(message)

        try:
            await app(scope, receive, noted)
        finally:
            path = scope["path"][:MOST_PATH]
            logger.debug(
                "%s %s %s: %d in %.3f s", told["id"], scope["method"], path, told["status"], time.monotonic() - begun
            )

    return logged


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket at an address, which does not accept connections yet.

    Raises:
        RefoldError: There is no such address here, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise RefoldError(f"host: an address of this machine is required (got {host!r}: {error})") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise _no_address(error, host, port) from None
    return found


def listen(bound: socket.socket) -> None:
    """Begins to accept connections.

    Raises:
        RefoldError: Another process has begun to listen at the address.
    """
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        raise _no_address(error, *bound.getsockname()[:2]) from None


def _no_address(error: OSError, host: str, port: int) -> RefoldError:
    reason = error.strerror or error
    return RefoldError(f"port: a free address is required (got {host}:{port}: {reason}); choose another --port")


def is_public(bound: socket.socket) -> bool:
    """Says whether other machines may reach an address."""
    return not ipaddress.ip_address(str(bound.getsockname()[0]).split("%")[0]).is_loopback


def address_of(bound: socket.socket) -> str:
    """Returns the URL of a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class StopSignals:
    """The signals that end a server: the first lets open requests end, the second ends the process at once.

    Args:
        links: Engines, which a second signal kills.
        log: Of this process.

    Attributes:
        links: The engines.
        received: Set by the first signal.
    """

    def __init__(self, links: Sequence[ProcessLink], log: LineLog):
        self.links, self._log = links, log
        self.received = asyncio.Event()

    def __enter__(self) -> "StopSignals":
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            # `nohup` switches SIGHUP off for good.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, self._take, number)
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)

    def _take(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self.received.is_set():
            self.received.set()
            logger.info("%s: the server stops", name)
            return
        logger.warning("%s again: the server ends at once", name)
        for link in self.links:
            link.kill()
        self._log.drain(0.2)
        os._exit(0)


async def serve_until_stopped(
    server: HttpServer,
    bound: socket.socket,
    signals: StopSignals,
    on_ready: Callable[[], None],
    on_stop: Callable[[], None],
) -> bool:
    """Serves until a signal comes or an engine is lost for good.

    Args:
        server: The server.
        bound: From `bind`.
        signals: Of this process, and of which engines.
        on_ready: Called when connections are accepted.
        on_stop: Called when no more requests are taken.

    Returns:
        Whether all engines ran to the end.
    """
    drain_seconds, links = server.settings.drain_seconds, signals.links
    listen(bound)
    serving = asyncio.create_task(server.serve([bound]), name="refold-http")
    sweeping = asyncio.create_task(server.sweep(), name="refold-sweep")
    stops = [asyncio.create_task(each.wait()) for each in (signals.received, *(link.over for link in links))]
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            on_ready()
        await asyncio.wait({serving, *stops}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        on_stop()
        num_open = sum(link.num_open for link in links)
        if num_open:
            logger.info("%d open answers have %g s to end", num_open, drain_seconds)
        await asyncio.wait({serving}, timeout=drain_seconds)
        if not serving.done():
            for link in links:
                if link.failure is None:
                    link.is_closing = True
                    link.lose("the server stops")
        await serving
        return not any(link.over.is_set() for link in links)
    finally:
        for task in (serving, sweeping, *stops):
            task.cancel()
        await asyncio.gather(serving, sweeping, *stops, return_exceptions=True)
