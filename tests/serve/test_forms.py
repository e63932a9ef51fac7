"""Answers keep to the form that a request asks for, and prompts are scored."""

import asyncio
import json
from typing import Any

import httpx2
import pytest

from tests.serve.conftest import NAME, Served, chunks_of

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 4},
        "days": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
MANY_PATTERNS = {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{length}}}$"} for length in range(30)]}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


def test_a_schema_is_kept(served: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
    found = served.chat("where", response_format=form, max_tokens=100, seed=1).json()
    answer = json.loads(found["choices"][0]["message"]["content"])
    assert set(answer) == {"city", "days"}
    assert found["choices"][0]["finish_reason"] == "stop"
    chunks = chunks_of(served.chat("where", response_format=form, max_tokens=100, seed=1, stream=True))
    joined = "".join(each["choices"][0]["delta"]["content"] for each in chunks)
    assert json.loads(joined) == answer


def test_other_forms_are_kept(served: Served) -> None:
    found = served.complete("a", structured_outputs={"choice": ["yes", "no"]}, seed=1)["choices"][0]
    assert found["text"] in ("yes", "no")
    found = served.complete("a", structured_outputs={"regex": "[0-9]{3}x"}, seed=1)["choices"][0]
    assert found["text"][:3].isdigit()
    assert found["text"][3:] == "x"


CALLING: dict[str, Any] = {"tools": [TOOL], "parallel_tool_calls": False, "max_tokens": 120, "seed": 1}


def test_a_required_call_is_made_and_streamed(served: Served) -> None:
    chunks = chunks_of(served.chat("where", stream=True, tool_choice="required", **CALLING))
    deltas = [each["choices"][0]["delta"] for each in chunks]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert not any(delta.get("content") for delta in deltas)
    pieces = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert {each["index"] for each in pieces} == {0}
    assert pieces[0]["function"]["name"] == "weather"
    assert set(json.loads("".join(each["function"]["arguments"] for each in pieces))) == {"city", "days"}


def test_a_named_function_is_called(served: Served) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    found = served.chat("where", tool_choice=choice, **CALLING).json()["choices"][0]
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["content"] is None
    [call] = found["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert set(json.loads(call["function"]["arguments"])) == {"city", "days"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"regex": "(?i)" + "[a-z]{0,50}" * 40}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"type": "number", "multipleOf": 1000003}}}, "structured_outputs"),
        ({"structured_outputs": {"json": MANY_PATTERNS}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(["}}, "structured_outputs"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "thing"}}}},
            "response_format",
        ),
    ],
)
def test_a_form_that_does_not_compile_is_refused(served: Served, fields: dict[str, Any], param: str) -> None:
    found = served.chat("a", **fields)
    assert found.status_code == 400
    assert found.json()["error"]["param"] == param
    assert found.json()["error"]["code"] == "bad_form"


def test_a_prompt_is_scored_with_echo(served: Served) -> None:
    ids = list(served.engine.prepare("def main(é").prompt_ids)
    found = served.complete(ids, echo=True, logprobs=1, max_tokens=0)
    told = found["choices"][0]["logprobs"]
    assert {len(each) for each in told.values()} == {len(ids)}
    assert told["token_logprobs"][0] is None
    assert all(each <= 0 for each in told["token_logprobs"][1:])
    assert found["usage"]["completion_tokens"] == 0
    assert found["choices"][0]["finish_reason"] == "length"
    both = served.complete("def main(", echo=True, logprobs=1, max_tokens=2, n=2)
    assert len(both["choices"][1]["logprobs"]["tokens"]) == 5
    assert both["choices"][0]["logprobs"]["text_offset"][3] == len("def main(")
    assert served.complete("def main(", echo=True, max_tokens=0)["choices"][0]["text"] == "def main("


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"exit_depth": 1, "exit_tolerance": 0}, "exit_tolerance"),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
    ],
    ids=str,
)
def test_fields_that_exclude_each_other_are_a_contradiction(served: Served, fields: dict[str, Any], param: str) -> None:
    error = served.post("/v1/completions", prompt="a", **fields).json()["error"]
    assert (error["param"], error["code"]) == (param, "contradiction")


def test_a_scored_prompt_may_fill_the_context(served: Served) -> None:
    found = served.complete([5] * 256, echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert len(found["logprobs"]["token_logprobs"]) == 256
    refused = served.post("/v1/completions", prompt=[5] * 257, echo=True, logprobs=0, max_tokens=0)
    assert refused.status_code == 400
    assert "at most 256 tokens, the model's 256 (got 257)" in refused.json()["error"]["message"]


def test_costly_forms_hold_up_nobody(served: Served) -> None:
    """A form that would take hours is refused in bounded time, while other answers go on."""

    async def ask() -> tuple[int, httpx2.Response]:
        transport = httpx2.ASGITransport(served.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=120) as client:
            slow = {"json": {"type": "number", "multipleOf": 1000007}}
            body = {"model": NAME, "prompt": "a", "max_tokens": 1}
            costly = asyncio.create_task(client.post("/v1/completions", json=body | {"structured_outputs": slow}))
            num_answered = 0
            while not costly.done():
                found = await client.post("/v1/completions", json=body)
                num_answered += found.status_code == 200
            return num_answered, await costly

    num_answered, refused = served.run(ask())
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "bad_form"
    assert num_answered >= 3


def test_the_reason_of_a_wrong_expression_is_told(served: Served) -> None:
    found = served.chat("a", structured_outputs={"regex": "a(b"})
    assert "unclosed group" in found.json()["error"]["message"]


def test_offsets_count_special_tokens_of_the_text(served: Served) -> None:
    assert served.engine.tokenizer is not None
    special = served.engine.tokenizer.all_special_ids[0]
    (word,) = served.engine.prepare(" in").prompt_ids[-1:]
    found = served.complete([special, word, special], echo=True, logprobs=0, max_tokens=0)["choices"][0]
    told = found["logprobs"]
    assert "".join(told["tokens"]) == found["text"]
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert found["text"].startswith(token, offset)
