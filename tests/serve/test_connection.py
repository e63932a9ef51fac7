"""Connections cost bounded time and memory, whatever a client does."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from refold.serve import connection, server
from refold.serve.server import HttpServer, bind, listen
from refold.serve.settings import ServeSettings

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[Any]]
CHUNK = b"x" * 65536


class Seen:
    """What the application has seen."""

    def __init__(self) -> None:
        self.num_left = 0
        self.paths: list[str] = []


def make_app(seen: Seen) -> Callable[..., Any]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        seen.paths.append(scope["path"])
        if scope["path"] == "/early":
            await send({"type": "http.response.start", "status": 413, "headers": [(b"connection", b"close")]})
            await send({"type": "http.response.body", "body": b"too large"})
            return
        length, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                seen.num_left += 1
                return
            length, more = length + len(message.get("body", b"")), message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/endless":
            leaving = asyncio.create_task(receive())
            while not leaving.done():
                await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
                await asyncio.sleep(0)
            seen.num_left += 1
            return
        await send({"type": "http.response.body", "body": str(length).encode()})

    return app


def served(talk: Talk, **given: Any) -> tuple[Any, Seen]:
    """Serves while a client talks, and returns what it says."""
    seen = Seen()

    async def run() -> Any:
        settings = ServeSettings(port=0, **given)
        http = HttpServer(make_app(seen), settings)
        with bind(settings.host, settings.port) as bound:
            listen(bound)
            tasks = [asyncio.create_task(http.serve([bound])), asyncio.create_task(http.sweep())]
            while not http.started:
                await asyncio.sleep(0.005)
            reader, writer = await asyncio.open_connection(*bound.getsockname()[:2])
            try:
                return await asyncio.wait_for(talk(reader, writer), 30)
            finally:
                writer.transport.abort()
                http.should_exit = True
                tasks[1].cancel()
                await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)

    return asyncio.run(run()), seen


def sending(data: bytes, then: Callable[[asyncio.StreamWriter], Awaitable[None]] | None = None) -> Talk:
    """Sends bytes and returns status and error of the answer."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, str]:
        writer.write(data)
        going = None if then is None else asyncio.create_task(then(writer))  # type: ignore[arg-type]
        answer = await reader.read()
        if going is not None:
            going.cancel()
        head, _, body = answer.partition(b"\r\n\r\n")
        if b"chunked" in head:
            body = body.split(b"\r\n")[1]
        told = (
            json.loads(body)["error"] if body.startswith(b"{") else {"code": body.decode(), "type": "", "param": None}
        )
        assert set(told) >= {"type", "param", "code"}
        return int(head.split()[1]), told["code"]

    return talk


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (connection, server):
        monkeypatch.setattr(module, "SWEEP_SECONDS", 0.05)


POST = b"POST /upload HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
FLOOD = b"GET / HTTP/1.1\r\nhost: x\r\n" + b"".join(b"h%d: v\r\n" % number for number in range(100_000)) + b"\r\n"
MANY = b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 120 + b"\r\n"


def test_requests_are_answered() -> None:
    (status, length), seen = served(sending(POST + b"content-length: 10000000\r\n\r\n" + b"a" * 10_000_000))
    assert (status, length) == (200, "10000000")
    assert seen.paths == ["/upload"]


def test_requests_are_logged_where_asked(caplog: pytest.LogCaptureFixture) -> None:
    data = POST.replace(b"/upload", b"/a%0Ab?key=secret") + b"content-length: 0\r\n\r\n"
    caplog.set_level("INFO", "refold.serve")
    served(sending(data))
    assert caplog.messages == []
    caplog.set_level("DEBUG", "refold.serve")
    served(sending(data))
    (line,) = caplog.messages
    assert line.startswith("- POST /a\nb: 200 in ")
    assert "secret" not in line


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (FLOOD, 431, "request_header_fields_too_large"),
        (b"GET /" + b"a" * 10_000_000, 431, "request_header_fields_too_large"),
        (MANY, 431, "request_header_fields_too_large"),
        (b"\x16\x03\x01\x02\x00 no HTTP\r\n\r\n", 400, "bad_request"),
        (POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\nabcdef", 400, "bad_request"),
        (POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400, "bad_request"),
        (POST + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n", 400, "bad_request"),
    ],
    ids=["flood", "long line", "many", "no http", "two lengths", "broken chunk", "two ends"],
)
def test_broken_requests_get_a_status(data: bytes, status: int, code: str) -> None:
    begun = time.monotonic()
    assert served(sending(data))[0] == (status, code)
    assert time.monotonic() - begun < 20


async def drip(writer: asyncio.StreamWriter) -> None:
    while not writer.is_closing():
        writer.write(b"a")
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    "data",
    [b"", b"GET / HTTP/1.1\r\nhost: x\r\nlong: ", POST + b"content-length: 1000\r\n\r\n"],
    ids=["all", "header", "body"],
)
def test_slow_requests_are_ended(data: bytes) -> None:
    answer, seen = served(sending(data, drip), read_seconds=0.4)
    assert answer == (408, "request_timeout")
    assert seen.num_left == (1 if b"POST" in data else 0)


def test_a_silent_client_is_let_go() -> None:
    assert served(sending(b""), read_seconds=0.3)[0] == (408, "request_timeout")


def test_a_slow_body_after_its_answer_is_ended() -> None:
    data = POST.replace(b"/upload", b"/early") + b"content-length: 1000000000\r\n\r\n"
    assert served(sending(data, drip), read_seconds=0.4)[0] == (413, "too large")


def test_an_answer_comes_through_while_the_client_sends() -> None:
    data = POST.replace(b"/upload", b"/early") + b"content-length: 10000000\r\n\r\n" + b"a" * 10_000_000
    assert served(sending(data))[0] == (413, "too large")


def test_a_client_that_reads_nothing_is_dropped() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.sleep(1.5)
        reader._transport.resume_reading()  # type: ignore[attr-defined]
        got = 0
        try:
            while read := await reader.read(1 << 20):
                got += len(read)
        except ConnectionError:
            pass
        return got

    got, seen = served(talk, write_seconds=0.4)
    assert got < 50_000_000
    assert seen.num_left == 1


def test_a_slow_reader_is_kept() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        writer.write(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
        got = 0
        for _ in range(20):
            got += len(await reader.read(1 << 20))
            await asyncio.sleep(0.05)
        return got

    got, _ = served(talk, write_seconds=0.4)
    assert got > 1_000_000


def test_too_many_connections_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MOST_CONNECTIONS", 0)
    monkeypatch.setattr(connection, "most_connections", lambda: 0)
    assert served(sending(b""))[0] == (503, "service_unavailable")


def test_there_are_fewer_connections_than_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection.resource, "getrlimit", lambda _: (100, 100))
    assert connection.most_connections() == 100 - connection.SPARE_FILES
    monkeypatch.setattr(connection.resource, "getrlimit", lambda _: (connection.resource.RLIM_INFINITY, 0))
    assert connection.most_connections() == connection.MOST_CONNECTIONS
