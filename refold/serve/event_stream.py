"""Answers that end when their client leaves: server-sent events, and work that is waited for."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from refold.serve.faults import ApiFault

Worked = TypeVar("Worked")
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client has left before its answer."""


def event(data: dict[str, Any]) -> bytes:
    """Returns an object as one event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def until_gone(receive: Receive, work: Coroutine[Any, Any, Worked]) -> Worked:
    """Returns the result of work, which is cancelled if the client leaves before.

    Args:
        receive: Of a request whose body has been read.
        work: What the client waits for.

    Raises:
        ClientGone: It has left.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come; when the client leaves, what makes them is closed at once.

    Args:
        first: Events that are there already.
        events: Makes the others; an `ApiFault` becomes the last event.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._events = first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer."""
        try:
            await until_gone(receive, self._send_all(send))
        except (ClientGone, OSError):
            pass
        finally:
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except ApiFault as fault:
            await send({"type": "http.response.body", "body": event(fault.body()) + DONE, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def open_stream(request: Request, events: AsyncGenerator[bytes, None]) -> EventStream:
    """Returns the answer whose first event has come, so that a fault before it still has a status of its own.

    Raises:
        ApiFault: There is no first event.
        ClientGone: The client has left.
    """
    try:
        first = await until_gone(request.receive, _next(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events)


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)
