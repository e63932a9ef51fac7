"""Calls of tools are found in every known format, wherever the text is cut."""

import json
from typing import Any

import pytest

from refold.serve.tool_calls import ALWAYS, FORMATS, AnswerPieces, CallFormat, CallReader, find_format, takes_tools
from tests.serve.conftest import TEMPLATE, Served

BY_NAME = {each.name: each for each in FORMATS}
CASES = {
    "hermes": (
        "hermes",
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern}", "days": [1, {"a": 2}]}}\n'
        '</tool_call>\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
        "Let me see.\n",
        [("weather", {"city": "Bern}", "days": [1, {"a": 2}]}), ("time", {})],
    ),
    "list in tags": ("hermes", '<tool_call>[{"name": "a", "arguments": {"x": 1}}]</tool_call>', "", [("a", {"x": 1})]),
    "arguments first": ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "a"}</tool_call>', "", [("a", {"x": 1})]),
    "arguments as text": (
        "hermes",
        '<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>',
        "",
        [("a", {"x": 1})],
    ),
    "mark within a string": (
        "hermes",
        '<tool_call>{"name": "a", "arguments": {"x": "</tool_call>y"}}</tool_call>',
        "",
        [("a", {"x": "</tool_call>y"})],
    ),
    "text after a call": ("hermes", '<tool_call>{"name": "a"}</tool_call> one  two ', " one  two ", [("a", {})]),
    "half a character": (
        "hermes",
        '<tool_call>{"arguments": {"x": "\\ud800"}, "name": "a"}</tool_call>',
        "",
        [("a", {"x": "\ud800"})],
    ),
    "name that is no text": (
        "hermes",
        '<tool_call>{"name": "a\\q", "arguments": {}}</tool_call>',
        '{"name": "a\\q", "arguments": {}}',
        [],
    ),
    "name with half a character": (
        "hermes",
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '{"name": "\\ud800", "arguments": {}}',
        [],
    ),
    "no number of JSON": (
        "hermes",
        '<tool_call>{"arguments": {"x": NaN}, "name": "a"}</tool_call>',
        '{"arguments": {"x": NaN}, "name": "a"}',
        [],
    ),
    "python without a number": ("gemma", "```tool_code\nf(a=1e999)\n```", "\nf(a=1e999)\n", []),
    "python with a mapping": ("gemma", '```tool_code\nf(**{"a": 1})\n```', '\nf(**{"a": 1})\n', []),
    "python with a mark": ("gemma", '```tool_code\nf(a="```")\n```', "", [("f", {"a": "```"})]),
    "no call": ("hermes", "a < b, <tool is text", "a < b, <tool is text", []),
    "broken call": ("hermes", "<tool_call>nothing</tool_call>", "nothing", []),
    "mistral list": (
        "mistral",
        '[TOOL_CALLS][{"name": "a", "arguments": {"x": "[TOOL"}}, {"name": "b", "arguments": {}}]',
        "",
        [("a", {"x": "[TOOL"}), ("b", {})],
    ),
    "mistral names": (
        "mistral",
        'Well.[TOOL_CALLS]a[ARGS]{"x": {"y": 1}}[TOOL_CALLS]b{"z": 2}',
        "Well.",
        [("a", {"x": {"y": 1}}), ("b", {"z": 2})],
    ),
    "llama": (
        "llama",
        '{"name": "a", "parameters": {"x": 1}}; {"name": "b", "parameters": {}}',
        "",
        [("a", {"x": 1}), ("b", {})],
    ),
    "llama tag": ("llama", '<|python_tag|>{"name": "a", "parameters": {"x": 1}}', "", [("a", {"x": 1})]),
    "llama text": ("llama", "The answer is {4}.", "The answer is {4}.", []),
    "llama object": ("llama", '{"answer": 4}', '{"answer": 4}', []),
    "phi": ("phi", '<|tool_call|>[{"name": "a", "arguments": {"x": 1}}]<|/tool_call|>', "", [("a", {"x": 1})]),
    "gemma": ("gemma", "```tool_code\nprint(a(x=1, y='b'))\n```", "", [("a", {"x": 1, "y": "b"})]),
    "gemma code": ("gemma", "```tool_code\nimport os\n```", "\nimport os\n", []),
}  # fmt: skip


def read(reader: CallReader, pieces: list[str]) -> AnswerPieces:
    found = AnswerPieces()
    for piece in pieces:
        found.join(reader.add(piece))
    found.join(reader.finish())
    return found


@pytest.mark.parametrize("case", CASES)
def test_calls_are_found_wherever_the_text_is_cut(case: str) -> None:
    name, text, content, calls = CASES[case]
    cuts = [[text], list(text), *([text[:place], text[place:]] for place in range(1, len(text)))]
    for pieces in cuts:
        found = read(CallReader(BY_NAME[name]), pieces)
        assert found.content == content
        assert [(each.name, json.loads(each.arguments)) for each in found.calls] == calls
        assert [each.index for each in found.calls] == list(range(len(calls)))
        assert len({each.id for each in found.calls}) == len(calls)


def test_arguments_come_as_the_text_comes() -> None:
    reader = CallReader(BY_NAME["hermes"])
    reader.add('<tool_call>{"name": "a", "arguments"')
    assert reader.add(': {"x":').calls[0].name == "a"
    assert reader.add(" 1").calls[0].arguments == " 1"
    assert reader.add(", ").calls[0].id is None
    assert reader.finish().calls == []


def test_at_most_one_call_is_kept_where_one_is_asked_for() -> None:
    text = CASES["hermes"][1]
    found = read(CallReader(BY_NAME["hermes"], most=1), list(text))
    assert [each.name for each in found.calls] == ["weather"]


def test_an_answer_that_must_be_calls_is_read_as_calls() -> None:
    text = '[{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}]'
    assert [each.name for each in read(CallReader(ALWAYS), list(text)).calls] == ["a", "b"]
    only = read(CallReader(ALWAYS, 1, "f"), ['{"x"', ": 1}"])
    assert [(each.name, each.arguments) for each in only.calls] == [("f", '{"x": 1}')]


@pytest.mark.parametrize(
    ("template", "takes", "name"),
    [
        (TEMPLATE, True, "hermes"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False, None),
        ("{% if tools is not none %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", True, "mistral"),
        ("{%- if tools %}Environment: ipython{% generation %}a{% endgeneration %}{% endif %}", True, "llama"),
        ("{% if tools %}<tool_call><function=a>{% endif %}", True, None),
        ("{% if message['tools'] %}<|tool|>{% endif %}", False, None),
        ("{% if tools %}{% unknown %}{% endif %}", False, None),
    ],
)
def test_a_template_tells_its_format(template: str, takes: bool, name: str | None) -> None:
    assert takes_tools(template) is takes
    found: CallFormat | None = find_format(template)
    assert (found and found.name) == name


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def test_tools_reach_the_template_and_no_call_is_text(served: Served) -> None:
    with_tools = served.chat("hi", tools=[TOOL], max_tokens=4, temperature=0).json()
    without = served.chat("hi", tools=[TOOL], tool_choice="none", max_tokens=4, temperature=0).json()
    assert with_tools["usage"]["prompt_tokens"] > without["usage"]["prompt_tokens"]
    message = with_tools["choices"][0]["message"]
    assert "tool_calls" not in message
    assert message["content"]


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"tools": [TOOL, TOOL]}, "tools", "must differ"),
        ({"tools": [{**TOOL, "function": {"name": "a", "strict": True}}]}, "tools", "`strict`"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "must be function"),
        ({"tools": [TOOL], "tool_choice": "some"}, "tool_choice", "must be none, auto"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "wether"}}},
            "tool_choice",
            "did you mean 'weather'",
        ),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format", "no `tools`"),
        ({"response_format": {"type": "xml"}}, "response_format", "must have the type"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
    ],
)
def test_wrong_tools_and_forms_are_refused(served: Served, fields: dict[str, Any], param: str, told: str) -> None:
    found = served.chat("hi", **fields)
    assert found.status_code == 400
    assert found.json()["error"]["param"] == param
    assert told in found.json()["error"]["message"]


def test_a_template_without_tools_refuses_them(served: Served) -> None:
    found = served.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}], tools=[TOOL])
    assert found.json()["error"]["code"] == "unsupported_parameter"
