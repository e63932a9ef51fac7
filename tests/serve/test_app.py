"""Completions and chat: what a request asks for is what its answer holds, streamed or not."""

from collections.abc import Callable
from typing import Any

import pytest

from refold.generation.sampling import Sampling
from tests.serve.conftest import NAME, Served, chunks_of

PROMPT = "def main("


def joined(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(each["text"] for chunk in chunks for each in chunk["choices"] if each["index"] == index)


def test_the_text_is_the_engines(served: Served) -> None:
    answer = served.complete(PROMPT, max_tokens=24, temperature=0, return_tokens=True, logprobs=2)
    choice = answer["choices"][0]
    tokens = [each["id"] for each in choice["refold_tokens"]]
    expected = served.run(_by_engine(served, Sampling(max_new_tokens=24)))
    assert choice["text"] == expected[0]
    assert tokens == expected[1]
    assert "".join(each["text"] for each in choice["refold_tokens"]) == choice["text"]
    assert {each["depth"] for each in choice["refold_tokens"]} == {12}
    assert answer["usage"]["completion_tokens"] == 24
    assert choice["finish_reason"] == "length"


async def _by_engine(served: Served, sampling: Sampling) -> tuple[str, list[int]]:
    """Asks the engine by the link alone."""
    text, tokens = "", []
    ids = served.engine.prepare(PROMPT).prompt_ids
    async with served.link.answer(ids, sampling, wants_tokens=True) as answer:
        async for part in answer.parts():
            text += part.text
            tokens += [part.token.token] if part.token is not None else []
    return text, tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"seed": 5, "temperature": 1.0, "n": 2},
        {"seed": 3, "logit_bias": {"128": 100, "103": 100, "227": 99, "160": 99, "131": 99}},
        {"seed": 3, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "top_k": 20, "min_p": 0.01, "top_p": 0.9},
    ],
    ids=["greedy", "two", "bytes", "penalties"],
)
def test_streamed_pieces_join_to_the_whole_text(served: Served, settings: dict[str, Any]) -> None:
    whole = served.complete(PROMPT, max_tokens=20, **settings)
    chunks = chunks_of(served.post("/v1/completions", prompt=PROMPT, max_tokens=20, stream=True, **settings))
    for choice in whole["choices"]:
        assert joined(chunks, choice["index"]) == choice["text"]
    ends = [each["finish_reason"] for chunk in chunks for each in chunk["choices"] if each["finish_reason"]]
    assert ends == ["length"] * len(whole["choices"])
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_a_stop_string_that_spans_tokens_ends_the_text_before_it(served: Served) -> None:
    text = served.complete(PROMPT, max_tokens=24, temperature=0)["choices"][0]["text"]
    place = next(place for place in range(6, len(text) - 4) if text.find(text[place : place + 4]) == place)
    settings = {"max_tokens": 24, "temperature": 0, "stop": ["not there", text[place : place + 4]]}
    choice = served.complete(PROMPT, **settings)["choices"][0]
    assert choice["text"] == text[:place]
    assert choice["finish_reason"] == "stop"
    chunks = chunks_of(served.post("/v1/completions", prompt=PROMPT, stream=True, return_tokens=True, **settings))
    assert joined(chunks) == text[:place]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    told = [token["text"] for chunk in chunks for token in chunk["choices"][0]["refold_tokens"]]
    assert "".join(told) == text[:place]


def test_every_form_of_prompt_is_taken(served: Served) -> None:
    ids = list(served.engine.prepare(PROMPT).prompt_ids)
    settings: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
    expected = served.complete(PROMPT, **settings)["choices"][0]["text"]
    assert served.complete(ids, **settings)["choices"][0]["text"] == expected
    assert served.complete([PROMPT], **settings)["choices"][0]["text"] == expected
    several = served.complete([ids, [0, 456], ids], n=2, **settings)
    assert [each["index"] for each in several["choices"]] == list(range(6))
    assert [several["choices"][place]["text"] for place in (0, 1, 4, 5)] == [expected] * 4
    assert several["choices"][2]["text"] == served.complete([0, 456], **settings)["choices"][0]["text"]
    assert several["usage"]["prompt_tokens"] == 2 * len(ids) + 2
    assert several["usage"]["completion_tokens"] == 36


def test_echo_puts_the_prompt_first(served: Served) -> None:
    plain = served.complete(PROMPT, max_tokens=4, temperature=0)["choices"][0]["text"]
    echoed = served.complete(PROMPT, max_tokens=4, temperature=0, echo=True, return_tokens=True)["choices"][0]
    assert echoed["text"] == PROMPT + plain
    assert "".join(each["text"] for each in echoed["refold_tokens"]) == PROMPT + plain
    chunks = chunks_of(
        served.post("/v1/completions", prompt=PROMPT, max_tokens=4, temperature=0, echo=True, stream=True)
    )
    assert joined(chunks) == PROMPT + plain


def test_completion_logprobs_have_offsets_into_the_text(served: Served) -> None:
    choice = served.complete(PROMPT, max_tokens=6, seed=1, logprobs=3)["choices"][0]
    found = choice["logprobs"]
    assert {len(each) for each in found.values()} == {6}
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == logprob
        assert len(top) in (3, 4)
        assert logprob <= 0
    chunks = chunks_of(served.post("/v1/completions", prompt=PROMPT, max_tokens=6, seed=1, logprobs=3, stream=True))
    streamed = [each for chunk in chunks for each in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert streamed == found["text_offset"]


def test_a_seed_repeats_and_its_absence_does_not(served: Served) -> None:
    first, second = (served.complete(PROMPT, max_tokens=16, seed=7)["choices"][0]["text"] for _ in range(2))
    assert first == second
    assert len({served.complete(PROMPT, max_tokens=16)["choices"][0]["text"] for _ in range(3)}) > 1
    served.complete(PROMPT, max_tokens=1, seed=-(2**63))


def test_usage_comes_last_and_tells_cached_tokens(served: Served) -> None:
    prompt = [0, *range(300, 400)]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks_of(served.post("/v1/completions", prompt=prompt, max_tokens=3, **options))
    chunks = chunks_of(served.post("/v1/completions", prompt=prompt, max_tokens=3, **options))
    assert chunks[-1]["choices"] == []
    usage = chunks[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (101, 3, 104)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 96
    assert [each["usage"] for each in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_chat_uses_the_template_and_streams_deltas(served: Served) -> None:
    settings: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    answer = served.chat("import os", return_tokens=True, **settings).json()
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert answer["object"] == "chat.completion"
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 8
    assert bytes(byte for each in content for byte in each["bytes"]).decode() == message["content"]
    assert all(len(each["top_logprobs"]) == 2 for each in content)
    chunks = chunks_of(served.chat("import os", stream=True, **settings))
    deltas = [each["choices"][0]["delta"] for each in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(each["content"] for each in deltas) == message["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert {each["object"] for each in chunks} == {"chat.completion.chunk"}


def test_chat_fills_the_context_where_no_number_is_given(served: Served) -> None:
    answer = served.chat("import os\n" * 60, ignore_eos=True, temperature=0).json()
    assert answer["usage"]["total_tokens"] == 256
    assert answer["usage"]["completion_tokens"] > 1
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_template_that_refuses_is_told(served: Served) -> None:
    found = served.chat("refuse")
    assert found.status_code == 400
    assert "no such words" in found.json()["error"]["message"]
    assert found.json()["error"]["code"] == "chat_template"


def test_roles_and_parts_reach_the_template(served: Served) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
    ]
    tokens = served.post("/tokenize", model="stdlib-chat", messages=messages).json()["tokens"]
    text = served.post("/detokenize", tokens=tokens).json()["prompt"]
    assert text.endswith("system: be brief\nuser: hi\nassistant: \ntool: 4\nassistant: ")


def test_tokenize_and_detokenize_are_inverse(served: Served) -> None:
    found = served.post("/tokenize", prompt="def é(): pass").json()
    assert found["count"] == len(found["tokens"]) == len(found["texts"])
    assert served.post("/detokenize", tokens=found["tokens"]).json()["prompt"] == "def é(): pass"


def test_models_version_and_state(served: Served) -> None:
    models = served.request("GET", "/v1/models").json()["data"]
    assert [each["id"] for each in models] == [NAME, "stdlib-chat"]
    assert served.request("GET", f"/v1/models/{NAME}").json() == models[0]
    assert served.request("GET", "/health").json() == {"status": "ok"}
    assert served.request("GET", "/ready").status_code == 200
    assert set(served.request("GET", "/version").json()) == {"version"}
    state = served.request("GET", "/state").json()
    assert [each["has_chat"] for each in state["models"]] == [False, True]
    assert state["models"][0]["max_context"] == 256
    served.complete(PROMPT, max_tokens=2)
    engines = served.request("GET", "/state").json()["engines"]
    assert list(engines) == [NAME]
    assert engines[NAME]["depths"]["12"] > 0


def test_the_end_of_the_application_closes_its_threads(make_served: Callable[..., Served]) -> None:
    served = make_served()
    threads = served.app.state.lineup.threads

    async def live() -> None:
        async with served.app.router.lifespan_context(served.app):
            assert await threads.run(1, lambda: "done") == "done"
        with pytest.raises(RuntimeError, match="shutdown"):
            await threads.run(1, lambda: None)

    served.run(live())
