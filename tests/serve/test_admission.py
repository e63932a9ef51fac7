"""A full server says so before any work, and a client that leaves gives its room back."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from refold.serve.settings import ServeSettings
from tests.serve.conftest import NAME, Served

LONG: dict[str, Any] = {"model": NAME, "prompt": "a", "max_tokens": 240, "ignore_eos": True}


async def is_at_rest(served: Served) -> bool:
    """Says whether the engine comes to rest within two seconds."""
    for _ in range(100):
        if not served.engine.has_work and served.link.num_open == 0:
            return True
        await asyncio.sleep(0.02)
    return False


def test_more_than_the_queue_holds_is_turned_away(make_served: Callable[..., Served]) -> None:
    served = make_served(ServeSettings(max_queue=2))

    async def ask() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(served.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=120) as client:
            body = {**LONG, "max_tokens": 12}
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(12)))

    found = served.run(ask())
    assert [each.status_code for each in found].count(200) == 6
    refused = [each for each in found if each.status_code == 429]
    assert len(refused) == 6
    assert all(int(each.headers["retry-after"]) > 0 for each in refused)
    assert {each.json()["error"]["code"] for each in refused} == {"queue_full"}
    assert {each.json()["error"]["type"] for each in refused} == {"rate_limit_error"}
    error = served.post("/v1/completions", prompt=["a"] * 7).json()["error"]
    assert error["code"] == "too_many_choices"
    assert served.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200


def test_tokens_of_open_requests_are_bounded(make_served: Callable[..., Served]) -> None:
    served = make_served(ServeSettings(max_total_tokens=40))

    async def ask() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(served.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=120) as client:
            body = {**LONG, "max_tokens": 24}
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(3)))

    found = served.run(ask())
    assert sorted(each.status_code for each in found) == [200, 429, 429]
    assert served.post("/v1/completions", prompt="a", max_tokens=100).json()["error"]["code"] == "too_many_tokens"
    assert served.post("/v1/completions", prompt="a", max_tokens=24).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_work(served: Served, stream: bool) -> None:
    """Sends a request over raw ASGI and disconnects after some chunks, or while the answer is waited for."""

    async def ask() -> bool:
        gone = asyncio.Event()
        num_chunks = 0
        sent = False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": json.dumps({**LONG, "stream": stream}).encode()}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal num_chunks
            num_chunks += message["type"] == "http.response.body"
            if num_chunks == 3:
                gone.set()

        scope: dict[str, Any] = {
            "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
            "query_string": b"", "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
            "scheme": "http", "server": ("server", 80), "client": ("client", 1), "root_path": "",
        }  # fmt: skip
        task = asyncio.create_task(served.app(scope, receive, send))  # type: ignore[arg-type]
        if not stream:
            while not served.engine.has_work:
                await asyncio.sleep(0.01)
            gone.set()
        await asyncio.wait_for(task, 20)
        return await is_at_rest(served)

    assert served.run(ask())
    text = served.request("GET", "/metrics").text
    assert f'refold_request_success_total{{finished_reason="abort",model_name="{NAME}"}}' in text


def test_a_request_that_takes_too_long_is_ended(make_served: Callable[..., Served]) -> None:
    served = make_served(ServeSettings(request_seconds=0.02))
    found = served.request("POST", "/v1/completions", json=LONG)
    assert found.status_code == 504
    assert found.json()["error"]["code"] == "request_timeout"
    assert served.run(is_at_rest(served))


def test_a_server_that_closes_takes_no_more(make_served: Callable[..., Served]) -> None:
    served = make_served()
    served.app.state.is_draining = True
    assert served.request("GET", "/ready").status_code == 503
    assert served.request("GET", "/health").status_code == 200
    found = served.post("/v1/completions", prompt="a")
    assert found.status_code == 503
    assert found.json()["error"]["code"] == "closing"
    assert found.headers["retry-after"]


def test_a_lost_engine_is_told_everywhere(make_served: Callable[..., Served]) -> None:
    served = make_served()

    async def lose() -> httpx2.Response:
        transport = httpx2.ASGITransport(served.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=120) as client:
            task = asyncio.create_task(client.post("/v1/completions", json=LONG))
            while served.link.num_open == 0:
                await asyncio.sleep(0.01)
            served.link.lose("it ran out of /some/secret/path")
            return await task

    try:
        found = served.run(lose())
        assert found.status_code == 503
        assert found.json()["error"]["code"] == "engine_lost"
        health = served.request("GET", "/health")
        assert health.status_code == 503
        assert "it ran out of ..." in health.json()["error"]["message"]
        assert served.post("/v1/completions", prompt="a").status_code == 503
        assert "refold_engine_up" in served.request("GET", "/metrics").text
    finally:
        served.link.failure = None
