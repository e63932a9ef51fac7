"""What the OpenAPI document says is what the server does, for made-up requests that keep to it and that do not."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok

from refold.engine.engine import Engine
from refold.engine.settings import EngineSettings
from tests.serve.conftest import MODEL, Served, chunks_of

SEMANTIC = {
    "context_length_exceeded",
    "chat_template",
    "contradiction",
    "empty_prompt",
    "no_chat_template",
    "out_of_range",
    "too_many_choices",
    "unsupported_parameter",
}
"""Codes of refusals for reasons that a schema cannot tell."""
FEW, MANY = 4, 260
SLOW = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large, HealthCheck.large_base_example)
PHASES = (Phase.explicit, Phase.generate)


@pytest.fixture(scope="module")
def serving_engine() -> Engine:
    """An engine with a short context, so that requests without a number of tokens are short too."""
    return Engine(MODEL, EngineSettings(max_rows=4, max_context=24))


def operations(address: str) -> Iterator[Any]:
    config = SchemathesisConfig()
    config.projects.default.checks.positive_data_acceptance.expected_statuses += ["400"]
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json", config=config)
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        yield found.ok()


def check(case: Any, mode: GenerationMode) -> None:
    """Sends a case, and checks its answer; a refused case that keeps to the document has a reason beyond it."""
    response = case.call_and_validate(timeout=120)
    if mode == GenerationMode.POSITIVE and response.status_code == 400:
        assert response.json()["error"]["code"] in SEMANTIC, (case.body, response.json())
    assert response.status_code < 500


def ask_all(operation: Any, mode: GenerationMode, num_cases: int) -> int:
    """Sends made-up requests to one operation, and returns their number."""
    total = 0

    @settings(max_examples=num_cases, derandomize=True, deadline=None, suppress_health_check=SLOW, phases=PHASES)
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        nonlocal total
        total += 1
        check(case, mode)

    ask()
    return total


def run(address: str, num_cases: int) -> int:
    total, failures = 0, []
    for operation in operations(address):
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode == GenerationMode.NEGATIVE and not operation.body and not operation.path_parameters:
                continue  # nothing can be wrong in a request that holds nothing
            try:
                total += ask_all(operation, mode, num_cases)
            except (Exception, FailureGroup) as error:
                failures.append(f"{operation.label}, {mode}: {error} {getattr(error, 'exceptions', '')}")
    assert not failures, "\n\n".join(failures)
    return total


def test_made_up_requests_are_answered_as_documented(address: str) -> None:
    assert run(address, FEW) >= 40


@pytest.mark.long
def test_two_thousand_made_up_requests_are_answered_as_documented(address: str) -> None:
    assert run(address, MANY) >= 2000


def test_every_answer_keeps_to_its_schema(served: Served) -> None:
    document = served.request("GET", "/openapi.json").json()

    def require(path: str, method: str, body: Any) -> None:
        content = document["paths"][path][method]["responses"]["200"]["content"]["application/json"]
        jsonschema.validate(body, {**content["schema"], "components": document["components"]})

    settings: dict[str, Any] = {"max_tokens": 3, "return_tokens": True}
    require("/v1/completions", "post", served.complete("a", logprobs=2, n=2, **settings))
    require("/v1/chat/completions", "post", served.chat("a", logprobs=True, top_logprobs=1, **settings).json())
    require("/v1/models", "get", served.request("GET", "/v1/models").json())
    require("/state", "get", served.request("GET", "/state").json())


def test_unused_fields_stand_in_the_document(served: Served) -> None:
    schemas = served.request("GET", "/openapi.json").json()["components"]["schemas"]
    assert schemas["CompletionBody"]["properties"]["best_of"]["enum"] == [1, None]
    assert "without effect" in schemas["ChatBody"]["properties"]["user"]["description"]
    assert schemas["ChatBody"]["additionalProperties"] is False
    assert chunks_of(served.post("/v1/completions", prompt="a", max_tokens=1, stream=True, best_of=1))


def test_the_reference_names_every_field_code_and_number(served: Served) -> None:
    page = Path("docs/reference/server-api.md").read_text(encoding="utf-8")
    schemas = served.request("GET", "/openapi.json").json()["components"]["schemas"]
    fields = {
        name for body in ("CompletionBody", "ChatBody", "StructuredOutputs") for name in schemas[body]["properties"]
    }
    assert {name for name in fields if f"`{name}`" not in page} == set()
    source = "".join(path.read_text(encoding="utf-8") for path in Path("refold/serve").glob("*.py"))
    codes = set(re.findall(r'code="(\w+)"', source))
    assert {code for code in codes if f"`{code}`" not in page} == set()
    numbers = {line.split()[2] for line in served.request("GET", "/metrics").text.splitlines() if "# TYPE" in line}
    assert {name for name in numbers if not name.endswith("_created") and f"`{name}`" not in page} == set()
