"""What stands before all routes: keys, request ids, sizes, and faults of ours."""

from collections.abc import Callable
from typing import Any

import pytest

from refold.serve.faults import without_paths
from refold.serve.settings import ServeSettings
from tests.serve.conftest import NAME, Served


@pytest.fixture(scope="module")
def guarded(make_served: Callable[..., Served]) -> Served:
    return make_served(ServeSettings(api_keys=("first-key", "schlüssel"), max_body=2000))


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": "first-key"}, {"authorization": "Basic first-key"},
     {"authorization": "Bearer "}],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/state", "/metrics", "/tokenize", "/v1/nope"])
def test_without_a_key_nothing_is_answered(guarded: Served, headers: dict[str, str], path: str) -> None:
    found = guarded.request("GET", path, headers=headers)
    assert found.status_code == 401
    assert found.json()["error"]["code"] == "invalid_api_key"
    assert found.json()["error"]["type"] == "authentication_error"
    assert found.headers["www-authenticate"].startswith("Bearer")


def test_every_key_opens_and_health_needs_none(guarded: Served) -> None:
    for key in ("first-key", "schlüssel"):
        headers = [(b"authorization", b"Bearer " + key.encode())]
        assert guarded.request("GET", "/v1/models", headers=headers).status_code == 200
    for path in ("/health", "/ready", "/version", "/openapi.json"):
        assert guarded.request("GET", path).status_code == 200


@pytest.mark.parametrize(("given", "kept"), [("abc-123", True), ("x" * 129, False), ("a b", False), ("é", False)])
def test_the_request_id_is_given_back_or_made(served: Served, given: str, kept: bool) -> None:
    for path in ("/v1/models", "/nope"):
        found = served.request("GET", path, headers=[(b"x-request-id", given.encode())])
        assert (found.headers["x-request-id"] == given) is kept
        assert found.headers["x-request-id"].startswith("req-") is not kept


def test_a_large_body_is_refused_unread(guarded: Served) -> None:
    headers = {"authorization": "Bearer first-key", "content-type": "application/json"}
    found = guarded.request("POST", "/v1/completions", content=b" " * 2001, headers=headers)
    assert found.status_code == 413
    assert "2,000" in found.json()["error"]["message"]
    num_sent = 0

    async def pieces() -> Any:
        nonlocal num_sent
        for _ in range(1000):
            num_sent += 1
            yield b" " * 500

    found = guarded.request("POST", "/v1/completions", content=pieces(), headers=headers)
    assert found.status_code == 413
    assert num_sent < 10


def test_requests_that_are_turned_away_are_counted_once_by_their_code(make_served: Callable[..., Served]) -> None:
    guarded = make_served(ServeSettings(api_keys=("key",), max_body=2000))
    headers = {"authorization": "Bearer key", "content-type": "application/json"}

    async def pieces() -> Any:
        for _ in range(5):
            yield b" " * 500

    guarded.request("GET", "/state")
    guarded.request("POST", "/v1/completions", content=b" " * 2001, headers=headers)
    guarded.request("POST", "/v1/completions", content=pieces(), headers=headers)
    lines = guarded.request("GET", "/metrics", headers=headers).text.splitlines()
    assert {line for line in lines if line.startswith("refold_request_rejections_total")} == {
        'refold_request_rejections_total{reason="invalid_api_key"} 1.0',
        'refold_request_rejections_total{reason="body_too_large"} 2.0',
    }


def test_a_fault_of_ours_tells_no_more_than_the_request_id(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret /etc/passwd")

    monkeypatch.setattr("refold.serve.generation_routes.read_sampling", fail)
    found = served.post("/v1/completions", prompt="a")
    assert found.status_code == 500
    assert found.json()["error"]["code"] == "internal_error"
    assert found.headers["x-request-id"] in found.json()["error"]["message"]
    assert "secret" not in found.text
    assert "ZeroDivisionError" in caplog.text


def test_no_other_origin_is_let_in(served: Served) -> None:
    found = served.request("GET", "/v1/models", headers={"origin": "http://elsewhere"})
    assert not [name for name in found.headers if name.startswith("access-control")]


def test_messages_lose_their_paths() -> None:
    told = without_paths("cannot open /root/models/secret.bin at 0x7f00deadbeef: broken\nTraceback")
    assert told == "cannot open ... at ...: broken"
    assert without_paths("see /health, and 1/2") == "see /health, and 1/2"
    assert NAME in without_paths(f"model {NAME}")
