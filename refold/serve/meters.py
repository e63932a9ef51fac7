"""Numbers for Prometheus: of requests as they come and go, and of engines as they tell their states.

The names are those of vLLM's metrics with `refold_` in front, so that its dashboards need one replacement.
"""

import time
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from refold.serve.asking import Asking, ChoicePart
from refold.serve.link import EngineLink

MODEL = "model_name"
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Meters:
    """The numbers of one application, in a registry of their own.

    Args:
        links: Engines by the name of their first model.
    """

    def __init__(self, links: Mapping[EngineLink, str]):
        self._registry = CollectorRegistry()

        def counter(name: str, told: str, *labels: str) -> Counter:
            return Counter(f"refold_{name}", told, labels or (MODEL,), registry=self._registry)

        def histogram(name: str, told: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"refold_{name}", told, (MODEL,), buckets=buckets, registry=self._registry)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = counter("prompt_tokens_cached", "Tokens of prompts that earlier prompts had computed.")
        self.generation_tokens = counter("generation_tokens", "New tokens.")
        self.success = counter("request_success", "Choices that ended, by reason.", MODEL, "finished_reason")
        self.rejections = counter("request_rejections", "Requests that were answered with an error.", "reason")
        self.first = histogram("time_to_first_token_seconds", "Time until the first text of a request.", _FIRST)
        self.between = histogram("inter_token_latency_seconds", "Time between two pieces of a choice.", _BETWEEN)
        self.whole = histogram("e2e_request_latency_seconds", "Time of a whole request.", _WHOLE)
        self.queued = histogram("request_queue_time_seconds", "Time until the first launch of a prompt.", _FIRST)
        self.request_prompt = histogram("request_prompt_tokens", "Tokens of the prompts of a request.", _TOKENS)
        self.request_new = histogram("request_generation_tokens", "New tokens of a request.", _TOKENS)
        self._registry.register(_Engines(links))

    def text(self) -> bytes:
        """Returns all numbers in Prometheus' format."""
        return generate_latest(self._registry)

    def reject(self, reason: str) -> None:
        """Counts a request that is answered with an error."""
        self.rejections.labels(reason).inc()


class RequestMeter:
    """Measures one request, as a context manager.

    Args:
        meters: Where it is counted.
        model: Name of its model.
    """

    def __init__(self, meters: Meters, model: str):
        self._meters, self._model = meters, model
        self._came = time.perf_counter()
        self._last: dict[int, float] = {}
        self._num_pieces = 0
        self._asking: Asking | None = None

    def __enter__(self) -> "RequestMeter":
        return self

    def __exit__(self, *_: object) -> None:
        asking, meters, model = self._asking, self._meters, self._model
        if asking is None:
            return
        for ended in asking.ended.values():
            for choice in ended.choices:
                meters.success.labels(model, choice.reason).inc()
            meters.cached_tokens.labels(model).inc(ended.cached_tokens)
            if "queued" in ended.seconds:
                meters.queued.labels(model).observe(ended.seconds["queued"])
        num_open = (asking.num_prompts - len(asking.ended)) * asking.sampling.n
        if num_open:
            meters.success.labels(model, "abort").inc(num_open)
            meters.generation_tokens.labels(model).inc(max(self._num_pieces, asking.num_new_tokens))
            return
        meters.generation_tokens.labels(model).inc(asking.num_new_tokens)
        meters.request_new.labels(model).observe(asking.num_new_tokens)
        meters.whole.labels(model).observe(time.perf_counter() - self._came)

    def begin(self, asking: Asking, num_prompt_tokens: int) -> None:
        """Takes the request when its prompts are tokens."""
        self._asking = asking
        self._meters.prompt_tokens.labels(self._model).inc(num_prompt_tokens)
        self._meters.request_prompt.labels(self._model).observe(num_prompt_tokens)

    def take(self, batch: Mapping[int, ChoicePart]) -> None:
        """Takes what has come for some choices."""
        now = time.perf_counter()
        if not self._last:
            self._meters.first.labels(self._model).observe(now - self._came)
        for index, part in batch.items():
            if index in self._last:
                self._meters.between.labels(self._model).observe(now - self._last[index])
            self._last[index] = now
            self._num_pieces += max(1, len(part.tokens))


class _Engines(Collector):
    """Turns the newest states of engines into metrics when they are asked for."""

    def __init__(self, links: Mapping[EngineLink, str]):
        self._links = links

    def describe(self) -> Iterable[Metric]:
        """Returns nothing: engines tell their facts only when they have started."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Yields the metrics of all engines."""
        gauges = {name: GaugeMetricFamily(f"refold_{name}", told, labels=[MODEL]) for name, told in _GAUGES.items()}
        counters = {name: CounterMetricFamily(f"refold_{name}", told, labels=[MODEL]) for name, told in _COUNTS.items()}
        depths = HistogramMetricFamily(
            "refold_exit_depth", "Tokens by the number of depths that computed them.", labels=[MODEL]
        )
        slots = GaugeMetricFamily(
            "refold_loop_slot_rows",
            "Running sequences by the segment of the stack that they stand before.",
            labels=[MODEL, "first_depth"],
        )
        for link, name in self._links.items():
            gauges["engine_up"].add_metric([name], 0.0 if link.failure is not None else 1.0)
            counters["engine_restarts"].add_metric([name], link.num_restarts)
            if link.state is None:
                continue
            for key, value in _gauges_of(link).items():
                gauges[key].add_metric([name], value)
            counters["num_preemptions"].add_metric([name], link.state.preemptions)
            counters["engine_tokens"].add_metric([name], link.state.new_tokens)
            counters["engine_launches"].add_metric([name], link.state.launches)
            depths.add_metric([name], *_histogram(link.state.depths, link.facts.num_depths))
            for slot in link.state.slots:
                slots.add_metric([name, str(slot.first_depth)], slot.rows)
        yield from (*gauges.values(), *counters.values(), depths, slots)


_GAUGES = {
    "engine_up": "Whether the engine runs.",
    "num_requests_running": "Sequences that have a row.",
    "num_requests_waiting": "Sequences that wait for a row.",
    "kv_cache_usage_perc": "Share of the pages of keys and values that is in use, 0 to 1.",
    "draft_acceptance_ratio": "Share of drafted tokens that were accepted.",
    "engine_memory_bytes": "Resident bytes of the engine's process.",
    "weight_bytes": "Bytes of the weights.",
}
_COUNTS = {
    "engine_restarts": "Times that the engine was started again.",
    "num_preemptions": "Sequences that gave way because memory ran out.",
    "engine_tokens": "New tokens of the engine, those of all its models.",
    "engine_launches": "Launches of the engine.",
}


def _gauges_of(link: EngineLink) -> dict[str, float]:
    state = link.state
    assert state is not None
    pages = state.used_pages + state.free_pages
    return {
        "num_requests_running": float(state.running),
        "num_requests_waiting": float(state.waiting),
        "kv_cache_usage_perc": state.used_pages / pages if pages else 0.0,
        "draft_acceptance_ratio": state.acceptance,
        "engine_memory_bytes": float(state.memory_bytes),
        "weight_bytes": float(link.facts.weight_bytes),
    }


def _histogram(depths: Mapping[int, int], num_depths: int) -> tuple[list[tuple[str, float]], float]:
    """Returns the cumulative buckets of a histogram with one bucket for each depth, and the sum of all values."""
    total, buckets = 0, []
    for depth in range(1, num_depths + 1):
        total += depths.get(depth, 0)
        buckets.append((str(float(depth)), float(total)))
    return [*buckets, ("+Inf", float(total))], float(sum(depth * tokens for depth, tokens in depths.items()))
