"""A served model over an engine in a thread, and requests to it with and without a network."""

import asyncio
import copy
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
import uvicorn
from starlette.applications import Starlette

from refold.engine.engine import Engine
from refold.engine.settings import EngineSettings
from refold.serve.app import make_app
from refold.serve.host import EngineHost
from refold.serve.link import ThreadLink
from refold.serve.served import ServedModel
from refold.serve.settings import ServeSettings

MODEL = "refold/shipped/stdlib-5m"
NAME = "stdlib"
CHAT = "stdlib-chat"
TEMPLATE = (
    "{% if tools %}Tools: {% for tool in tools %}{{ tool.function.name }} {% endfor %}"
    "Write <tool_call>JSON</tool_call>.\n{% endif %}"
    "{% for message in messages %}"
    "{% if message.content == 'refuse' %}{{ raise_exception('no such words') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass
class Served:
    """An application, its engine and the loop that both run in."""

    engine: Engine
    link: ThreadLink
    app: Starlette
    loop: asyncio.AbstractEventLoop

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine in the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(120)

    def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Sends one request."""

        async def send() -> httpx2.Response:
            transport = httpx2.ASGITransport(self.app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=120) as client:
                return await client.request(method, path, **options)

        return self.run(send())

    def post(self, path: str, model: str = NAME, **body: Any) -> httpx2.Response:
        """Sends a body to the model."""
        return self.request("POST", path, json={"model": model, **body})

    def complete(self, prompt: Any, **body: Any) -> dict[str, Any]:
        """Returns the answer to a completion that succeeds."""
        found = self.post("/v1/completions", prompt=prompt, **body)
        assert found.status_code == 200, found.text
        return found.json()

    def chat(self, *contents: str, **body: Any) -> httpx2.Response:
        """Sends a conversation of the user's messages."""
        messages = [{"role": "user", "content": each} for each in contents]
        return self.post("/v1/chat/completions", model=CHAT, messages=messages, **body)


def chunks_of(found: httpx2.Response) -> list[dict[str, Any]]:
    """Returns the chunks of a stream, which ends with `[DONE]`."""
    assert found.status_code == 200, found.text
    assert found.headers["content-type"].startswith("text/event-stream")
    events = found.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(each.startswith("data: ") for each in events[:-1])
    return [json.loads(each[6:]) for each in events[:-2]]


@pytest.fixture(scope="session")
def serving_engine() -> Engine:
    """The engine of the shipped model."""
    return Engine(MODEL, EngineSettings(max_rows=4, max_context=256))


@pytest.fixture(scope="module")
def make_served(serving_engine: Engine) -> Iterator[Callable[..., Served]]:
    """Makes an application over the engine, with settings."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    links: list[ThreadLink] = []
    tokenizer = copy.deepcopy(serving_engine.tokenizer)
    assert tokenizer is not None
    tokenizer.chat_template = TEMPLATE

    def run(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(120)

    def make(settings: ServeSettings | None = None) -> Served:
        if not links:
            links.append(ThreadLink(lambda send: EngineHost(serving_engine, send)))
            run(links[0].start())
        models = [
            ServedModel(NAME, links[0], serving_engine.tokenizer),
            ServedModel(CHAT, links[0], tokenizer),
        ]
        return Served(serving_engine, links[0], make_app(models, settings or ServeSettings()), loop)

    yield make
    for link in links:
        run(link.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.fixture(scope="module")
def served(make_served: Callable[..., Served]) -> Served:
    """An application with the default settings."""
    return make_served()


@pytest.fixture(scope="module")
def address(served: Served) -> Iterator[str]:
    """Address of the application on a port."""
    server = uvicorn.Server(uvicorn.Config(served.app, port=0, log_level="warning", lifespan="off"))
    ended = asyncio.run_coroutine_threadsafe(server.serve(), served.loop)
    while not server.started:
        served.run(asyncio.sleep(0.02))
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    ended.result(30)
