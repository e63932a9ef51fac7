"""Requests that servers are known to answer badly: each has one right answer here."""

import json
from typing import Any

import pytest

from tests.serve.conftest import CHAT, NAME, Served, chunks_of

JSON = {"content-type": "application/json"}


def error_of(found: Any, status: int) -> dict[str, Any]:
    assert found.status_code == status, found.text
    assert found.headers["x-request-id"]
    body = found.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in found.text
    assert "/work" not in found.text
    return body["error"]


def test_an_empty_prompt_is_the_start_token_or_an_error(served: Served) -> None:
    assert served.complete("", max_tokens=2)["usage"]["prompt_tokens"] == 1
    for prompt in ([], [[]], [[1], []]):
        assert error_of(served.post("/v1/completions", prompt=prompt), 400)["param"] == "prompt"
    assert error_of(served.post("/v1/completions"), 400)["message"].startswith("prompt: required")
    assert served.complete("a", max_tokens=1)["choices"]


def test_a_prompt_over_the_context_is_told_both_lengths(served: Served) -> None:
    error = error_of(served.post("/v1/completions", prompt=[5] * 768), 400)
    assert "255" in error["message"]
    assert "768" in error["message"]
    assert error["code"] == "context_length_exceeded"
    error = error_of(served.post("/v1/completions", prompt=[5] * 200, max_tokens=100), 400)
    assert error["param"] == "max_tokens"
    assert "56" in error["message"]
    assert "200" in error["message"]


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("max_tokens", -1, "at least 0"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", "4", "a whole number"),
        ("max_tokens", 1.5, "a whole number"),
        ("max_tokens", True, "a whole number"),
        ("max_tokens", 10**30, "at most"),
        ("temperature", 99, "at most 2"),
        ("temperature", -1, "at least 0"),
        ("temperature", "hot", "a number"),
        ("top_p", 0, "above 0"),
        ("top_k", -2, "at least -1"),
        ("n", 0, "at least 1"),
        ("n", 100, "at most 68"),
        ("stop", ["a"] * 17, "at most 16"),
        ("stop", "", "at least one character"),
        ("stop", [1], "text or a list"),
        ("logprobs", 21, "at most 20"),
        ("logit_bias", {"x": 1}, "token ids"),
        ("logit_bias", {"1": 200}, "-100..100"),
        ("logit_bias", {"01": 1, "1": 5}, "different token ids"),
        ("logit_bias", {"99999": 1}, "must lie in 0.."),
        ("exit_depth", 13, "1..12"),
        ("exit_tolerance", 0.1, "served without calibrated exits"),
        ("repetition_penalty", 5e-324, "at least 0.01"),
        ("prompt", [1, "a"], "all be"),
        ("prompt", [99999], "must lie in 0.."),
        ("prompt", [3, -1], "entry 1 must be a whole number in 0.."),
        ("prompt", [[3], [4, 1.5]], "entry 1, token 1 must be a whole number in 0.."),
        ("prompt", ["a"] * 129, "at most 128 prompts (got 129)"),
        ("prompt", {"a": 1}, "text, token ids"),
        ("echo", "yes", "true or false"),
        ("stream_options", {"include_usage": True}, "`stream` must be true"),
        ("best_of", 2, "not ranked"),
        ("suffix", "end", "fill a gap"),
        ("service_tier", "flex", "one tier"),
        ("seed", 2**63, "at most"),
        ("model", 3, "text"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_field(served: Served, field: str, value: Any, told: str) -> None:
    body = {"model": NAME, "prompt": "a", field: value}
    error = error_of(served.request("POST", "/v1/completions", json=body), 400)
    assert error["param"] == field
    assert error["message"].startswith(f"{field}: ")
    assert told in error["message"]


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("messages", [], "must not be empty"),
        ("messages", "hi", "a list"),
        ("store", True, "not stored"),
        ("audio", {"voice": "x"}, "text alone"),
        ("functions", [{"name": "f"}], "give `tools`"),
        ("top_logprobs", 3, "`logprobs` must be true"),
        ("modalities", ["text", "audio"], "text alone"),
        ("tool_choice", "required", "`tools` are required"),
        ("max_completion_tokens", 0, "at least 1"),
    ],
)
def test_a_wrong_value_of_chat_is_an_error_that_names_the_field(
    served: Served, field: str, value: Any, told: str
) -> None:
    body = {"model": CHAT, "messages": [{"role": "user", "content": "a"}], field: value}
    error = error_of(served.request("POST", "/v1/chat/completions", json=body), 400)
    assert error["param"] == field
    assert told in error["message"]


@pytest.mark.parametrize(
    ("message", "param", "told"),
    [
        ({"role": "usr", "content": "a"}, "messages[0]", "did you mean 'user'"),
        ({"role": "user"}, "messages[0].content", "required"),
        ({"role": "user", "content": None}, "messages[0].content", "must be text"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content", "images are not supported"),
        ({"role": "user", "content": "a", "nam": "b"}, "messages[0].nam", "did you mean 'name'"),
        ({"role": "tool", "content": "a"}, "messages[0].tool_call_id", "required"),
        ("hi", "messages[0]", "an object"),
    ],
)
def test_a_wrong_message_is_named_by_its_place(served: Served, message: Any, param: str, told: str) -> None:
    error = error_of(served.post("/v1/chat/completions", model=CHAT, messages=[message]), 400)
    assert error["param"] == param
    assert told in error["message"]


def test_fields_without_effect_are_taken(served: Served) -> None:
    served.complete("a", max_tokens=1, user="me", best_of=1, suffix=None, prompt_cache_key="k", metadata={"a": "b"})
    assert served.chat("a", max_tokens=1, user="me", store=False, safety_identifier="x").status_code == 200


def test_an_unknown_field_is_named_with_the_closest(served: Served) -> None:
    error = error_of(served.post("/v1/completions", prompt="a", max_token=3), 400)
    assert error["message"] == "max_token: unknown key; did you mean 'max_tokens'?"
    assert error["code"] == "unknown_parameter"


@pytest.mark.parametrize("name", ["stdlb", "../../etc/passwd", "", "x" * 1000, "refold/shipped/stdlib-5m"])
def test_an_unknown_model_is_not_found(served: Served, name: str) -> None:
    error = error_of(served.post("/v1/completions", model=name, prompt="a"), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "valid JSON"),
        (b"{", "valid JSON"),
        (b"[1]", "a JSON object"),
        (b'"a"', "a JSON object"),
        (b'{"model": "\xff\xfe"}', "valid JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "valid JSON"),
        (b'{"temperature": NaN}', "valid JSON"),
        (b'{"temperature": 1e999, "model": "stdlib", "prompt": "a"}', "temperature"),
        (b'{"a": "\\ud800"}', "valid JSON"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", ""),
    ],
    ids=["empty", "cut", "list", "text", "not UTF-8", "deep", "NaN", "infinite", "half a character", "long number"],
)
def test_a_body_that_is_no_json_object_is_an_error(served: Served, content: bytes, told: str) -> None:
    found = served.request("POST", "/v1/completions", content=content, headers=JSON)
    assert told in error_of(found, 400)["message"]


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"])
def test_another_kind_of_body_is_refused(served: Served, media: str) -> None:
    headers = {"content-type": media} if media else {}
    error_of(served.request("POST", "/v1/completions", content=b"{}", headers=headers), 415)


def test_an_unknown_route_and_method_have_the_same_shape(served: Served) -> None:
    for path in ("/nope", "/v1/nope", "/v1/models/nope", "/v1/models/", "/v1/models/a/b"):
        error_of(served.request("GET", path), 404)
    found = served.request("GET", "/v1/completions")
    assert "POST" in error_of(found, 405)["message"]
    assert found.headers["allow"] == "POST"
    error_of(served.request("DELETE", "/v1/models"), 405)


def test_embeddings_are_refused_with_the_reason(served: Served) -> None:
    assert "not trained" in error_of(served.post("/v1/embeddings", input="a"), 404)["message"]


def test_stop_logprobs_n_and_echo_are_honoured(served: Served) -> None:
    found = served.complete("import os", n=2, logprobs=1, max_tokens=3, stop="zzzz")
    assert len(found["choices"]) == 2
    assert all(len(each["logprobs"]["tokens"]) == 3 for each in found["choices"])
    assert served.complete("import os", echo=True, max_tokens=1)["choices"][0]["text"].startswith("import os")


def test_a_model_without_a_chat_template_says_so(served: Served) -> None:
    messages = [{"role": "user", "content": "a"}]
    error = error_of(served.post("/v1/chat/completions", messages=messages), 400)
    assert error["code"] == "no_chat_template"


def test_a_fault_in_a_stream_that_has_not_begun_has_its_status(served: Served) -> None:
    error_of(served.post("/v1/completions", prompt=[5] * 768, stream=True), 400)
    assert chunks_of(served.post("/v1/completions", prompt="a", stream=True, max_tokens=1))


def test_metrics_are_there_and_count_refusals(served: Served) -> None:
    served.post("/v1/completions", prompt=[5] * 768)
    found = served.request("GET", "/metrics")
    assert found.status_code == 200
    assert 'refold_request_rejections_total{reason="context_length_exceeded"}' in found.text
    assert json.dumps(NAME) in found.text
