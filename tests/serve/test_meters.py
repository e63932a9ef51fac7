"""Numbers for Prometheus count what happened, and the dashboard names only numbers that exist."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.conftest import CHAT, NAME, Served

DASHBOARD = Path("docs/grafana-dashboard.json")


def numbers(served: Served) -> dict[tuple[str, str], float]:
    """Returns all samples, by name and by the values of their labels."""
    text = served.request("GET", "/metrics").text
    return {
        (sample.name, ",".join(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_are_counted_by_their_model(served: Served) -> None:
    before = numbers(served)
    served.complete([0, *range(100, 110)], max_tokens=5, n=2)
    assert served.chat("a", max_tokens=3, stream=True).status_code == 200
    after = numbers(served)

    def grown(name: str, labels: str) -> float:
        return after[f"refold_{name}", labels] - before.get((f"refold_{name}", labels), 0)

    assert grown("prompt_tokens_total", NAME) == 11
    assert grown("generation_tokens_total", NAME) == 10
    assert grown("generation_tokens_total", CHAT) == 3
    assert grown("request_success_total", f"length,{NAME}") == 2
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert grown(f"{name}_count", NAME) == 1
        assert grown(f"{name}_sum", NAME) > 0
    assert grown("inter_token_latency_seconds_count", NAME) > 0
    assert grown("request_generation_tokens_sum", NAME) == 10
    assert after["refold_engine_up", NAME] == 1
    assert after["refold_exit_depth_count", NAME] >= 13
    assert after["refold_exit_depth_bucket", f"12.0,{NAME}"] == after["refold_exit_depth_count", NAME]
    assert after["refold_num_requests_running", NAME] == 0
    assert after["refold_kv_cache_usage_perc", NAME] <= 1


def test_the_dashboard_names_numbers_that_are_exported(served: Served) -> None:
    served.complete("a", max_tokens=2)
    served.post("/v1/completions", model="none")
    text = served.request("GET", "/metrics").text
    exported = set()
    for family in text_string_to_metric_families(text):
        endings = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}.get(family.type, ("",))
        exported |= {family.name + ending for ending in endings if not family.name.endswith("_created")}
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    named = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            found = re.findall(r"refold_\w+", target["expr"])
            assert found, panel["title"]
            named |= set(found)
    assert named - exported == set()
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported}
    assert families - {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} == set()


@pytest.mark.parametrize("status", ["model_not_found", "invalid_json"])
def test_refusals_are_counted_by_reason(served: Served, status: str) -> None:
    if status == "invalid_json":
        served.request("POST", "/v1/completions", content=b"{", headers={"content-type": "application/json"})
    else:
        served.post("/v1/completions", model="none", prompt="a")
    assert numbers(served)["refold_request_rejections_total", status] >= 1
