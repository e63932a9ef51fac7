"""Clients that people have work unchanged."""

import asyncio
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest

from refold.serve.settings import ServeSettings
from tests.serve.conftest import CHAT, NAME, Served

MESSAGES: Any = [{"role": "user", "content": "import os"}]


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_openai_completes(client: openai.OpenAI, served: Served) -> None:
    found = client.completions.create(model=NAME, prompt="def main(", max_tokens=8, temperature=0, logprobs=1)
    assert found.choices[0].text == served.complete("def main(", max_tokens=8, temperature=0)["choices"][0]["text"]
    assert found.choices[0].logprobs is not None
    assert found.usage is not None
    assert found.usage.completion_tokens == 8
    chunks = list(client.completions.create(model=NAME, prompt="def main(", max_tokens=8, temperature=0, stream=True))
    assert "".join(each.choices[0].text for each in chunks) == found.choices[0].text


def test_openai_chats(client: openai.OpenAI) -> None:
    settings: Any = {"model": CHAT, "messages": MESSAGES, "max_completion_tokens": 8, "temperature": 0}
    found = client.chat.completions.create(**settings, extra_body={"return_tokens": True})
    text = found.choices[0].message.content
    assert text
    assert len(found.choices[0].model_extra["refold_tokens"]) == 8  # type: ignore[index]
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == text
    assert chunks[-1].usage is not None


def test_openai_chats_asynchronously(address: str, client: openai.OpenAI) -> None:
    async def ask() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=120) as other:
            settings: Any = {"model": CHAT, "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
            found = await other.chat.completions.create(**settings)
            pieces = [each async for each in await other.chat.completions.create(**settings, stream=True)]
            return found.choices[0].message.content, "".join(each.choices[0].delta.content or "" for each in pieces)

    whole, joined = asyncio.run(ask())
    assert whole == joined


def test_openai_lists_models(client: openai.OpenAI) -> None:
    assert [each.id for each in client.models.list()] == [NAME, CHAT]
    assert client.models.retrieve(CHAT).owned_by == "refold"


def test_openai_maps_errors_to_its_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="prompt: must be at most 255 tokens") as long:
        client.completions.create(model=NAME, prompt=[5] * 300)
    assert (long.value.param, long.value.type) == ("prompt", "invalid_request_error")
    assert long.value.request_id
    with pytest.raises(openai.BadRequestError, match="unknown key"):
        client.completions.create(model=NAME, prompt="a", extra_body={"max_token": 1})


def test_openai_maps_keys_fullness_and_faults(
    make_served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = make_served(ServeSettings(api_keys=("key",), max_total_tokens=10))

    async def ask(key: str, **body: Any) -> Any:
        http: Any = httpx2.AsyncClient(transport=httpx2.ASGITransport(served.app), base_url="http://server")
        async with openai.AsyncOpenAI(
            base_url="http://server/v1", api_key=key, http_client=http, max_retries=0
        ) as client:
            return await client.completions.create(model=NAME, prompt="a", **body)

    with pytest.raises(openai.AuthenticationError):
        served.run(ask("wrong"))
    assert served.run(ask("key", max_tokens=2)).choices
    admission = served.app.state.lineup.places[NAME].admission
    admission.num_tokens = 10
    with pytest.raises(openai.RateLimitError) as full:
        served.run(ask("key", max_tokens=2))
    assert full.value.response.headers["retry-after"]
    admission.num_tokens = 0
    monkeypatch.setattr("refold.serve.generation_routes.read_sampling", None)
    with pytest.raises(openai.InternalServerError):
        served.run(ask("key", max_tokens=2))


def test_an_error_in_a_stream_reaches_the_client(make_served: Callable[..., Served]) -> None:
    served = make_served(ServeSettings(request_seconds=0.3))

    async def ask() -> int:
        http: Any = httpx2.AsyncClient(transport=httpx2.ASGITransport(served.app), base_url="http://server")
        async with openai.AsyncOpenAI(base_url="http://server/v1", api_key="none", http_client=http) as client:
            stream = await client.completions.create(
                model=NAME, prompt=["a"] * 16, max_tokens=240, stream=True, extra_body={"ignore_eos": True}
            )
            return len([each async for each in stream])

    with pytest.raises(openai.APIError, match=r"must end within 0\.3 seconds"):
        served.run(ask())
    counted = served.request("GET", "/metrics").text
    assert 'refold_request_rejections_total{reason="request_timeout"} 1.0' in counted


def test_langchain_chats(address: str) -> None:
    chat_models = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    model = chat_models.ChatOpenAI(
        base_url=f"{address}/v1", api_key="none", model=CHAT, max_tokens=6, temperature=0, max_retries=0
    )
    whole = model.invoke("import os").content
    assert whole
    assert "".join(each.content for each in model.stream("import os")) == whole


@pytest.mark.long
def test_litellm_chats(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    settings = {"model": f"openai/{CHAT}", "api_base": f"{address}/v1", "api_key": "none", "messages": MESSAGES}
    found = litellm.completion(**settings, max_tokens=6, temperature=0)
    assert found.choices[0].message.content
    pieces = litellm.completion(**settings, max_tokens=6, temperature=0, stream=True)
    assert "".join(each.choices[0].delta.content or "" for each in pieces) == found.choices[0].message.content
    assert "litellm" in sys.modules
