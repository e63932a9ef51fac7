"""Refold's engine and transformers as contenders, and measurements of the machine.

python benchmarks/peers/own.py '{"kind": "engine", "model": "FOLDER", "settings": {"weights": "bfloat16"}}'
"""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from protocol import Answer, Request, answer_requests
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from refold.modeling.load import load_model
from refold.studies.contender import Contender, ContinuousContender, EngineContender, StaticContender
from refold.studies.workload import Job, Workload

STREAM_BYTES = 512 << 20
"""Bytes of the array that is read for the bandwidth: far more than any cache holds."""


def _product_flops(x_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Returns the FLOPs of a linear from the shapes of its input and its output."""
    return 2 * math.prod(x_shape) * out_shape[-1]


PACKED_PRODUCTS = dict.fromkeys(
    (
        torch.ops.mkldnn._linear_pointwise,
        torch.ops.aten._weight_int8pack_mm,
        torch.ops.aten._weight_int4pack_mm_for_cpu,
    ),
    _product_flops,
)
"""Products with packed weights, which PyTorch's counter does not know."""


class Work:
    """A contender as a function of requests."""

    def __init__(self, contender: Contender):
        self.contender = contender

    def run(self, request: Request) -> Answer:
        """Answers a request; `how.flops` counts the FLOPs of its launches."""
        jobs = [
            Job(index, 0.0, tuple(prompt), new)
            for index, (prompt, new) in enumerate(zip(request.prompts, request.new, strict=True))
        ]
        workload, extra = Workload(tuple(jobs), request.rows), {}
        if request.how.get("flops"):
            with FlopCounterMode(display=False, custom_mapping=PACKED_PRODUCTS) as counter:
                served = self.contender.serve(workload)
            extra["flops"] = counter.get_total_flops()
        else:
            served = self.contender.serve(workload)
        extra["depths"] = [list(each.depths) for each in served]
        return Answer([list(each.tokens) for each in served], extra)


class EngineWork(Work):
    """The engine, with its counts, replayed exits, and predictions along given tokens.

    Args:
        spec: `model`, `settings`, and optionally `exits` (`{measure, thresholds}`, a file, or `replay`) and `drafts`.
    """

    def __init__(self, spec: dict[str, Any]):
        from refold.engine.engine import Engine
        from refold.engine.exits import ExitRule
        from refold.engine.settings import Drafts, EngineSettings

        settings = dict(spec["settings"])
        self._replayed: list[list[int]] = []
        exits = spec.get("exits")
        if exits == "replay":
            settings["exits"] = ExitRule("gate", {}, lambda index, place: self._replayed[index][place])
        elif isinstance(exits, dict):
            settings["exits"] = ExitRule(
                exits["measure"], {int(key): value for key, value in exits["thresholds"].items()}
            )
        elif exits is not None:
            settings["exits"] = Path(exits)
        if "drafts" in spec:
            settings["drafts"] = Drafts(**spec["drafts"])
        self.engine = Engine(spec["model"], EngineSettings(**settings))
        super().__init__(EngineContender(self.engine))

    def run(self, request: Request) -> Answer:
        """Answers a request; `how.depths` are the exits to replay, `how.forced` tokens to predict along."""
        if "forced" in request.how:
            return self._predict(request, request.how["forced"])
        self._replayed = request.how.get("depths", [])
        before = self._counts()
        answer = super().run(request)
        after = self._counts()
        answer.extra |= {name: after[name] - before[name] for name in after}
        report = self.engine.statistics()
        answer.extra |= {
            "acceptance": report.acceptance,
            "memory": report.memory_bytes,
            "weights": report.weight_bytes,
            "num_depths": self.engine.model.config.num_hidden_layers,
        }
        return answer

    def _counts(self) -> dict[str, float]:
        counts = self.engine.statistics().counts
        found = {
            name: getattr(counts, name)
            for name in ("launches", "new_tokens", "model_seconds", "sampling_seconds", "other_seconds")
        }
        found["run_depths"] = sum(depth * count for depth, count in counts.depths.items())
        found["ended_tokens"] = sum(counts.depths.values())
        return found

    def _predict(self, request: Request, forced: list[list[int]]) -> Answer:
        """Returns the predictions along the given tokens: each differs by itself, not because of an earlier one."""
        from refold.generation.sampling import Sampling

        open_requests = []
        self._replayed = request.how.get("depths", [])
        for index, (prompt, tokens) in enumerate(zip(request.prompts, forced, strict=True)):
            sampling = Sampling(max_new_tokens=len(tokens), ignore_eos=True)
            made = self.engine.prepare(prompt, sampling, index=index, forced=tokens)
            self.engine.submit(made)
            open_requests.append(made)
        results = []
        while not all(each.is_finished for each in open_requests):
            self.engine.step()
        for each in open_requests:
            results.append(self.engine.take(each))
        depths = [list(result.choices[0].depths) for result in results]
        return Answer([list(each.predicted[0]) for each in open_requests], {"depths": depths})


def measure_machine(request: Request) -> Answer:
    """Returns bytes per second of reading and FLOPs per second of products."""
    numbers = torch.ones(STREAM_BYTES // 4)
    kept = torch.empty_like(numbers)
    rates: dict[str, float] = {
        "read": STREAM_BYTES / _best(lambda: numbers.sum()),
        "copy": 2 * STREAM_BYTES / _best(lambda: kept.copy_(numbers)),
    }
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        best = 0.0
        for rows, inner, columns in ((1024, 1024, 1024), (2048, 2048, 2048), (512, 768, 2048)):
            a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
            seconds = _best(lambda a=a, b=b: torch.nn.functional.linear(a, b))
            best = max(best, 2 * rows * inner * columns / seconds)
        rates[name] = best
    return Answer([[0]], rates)


def _best(work: Callable[[], object], seconds: float = 0.5) -> float:
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def make_work(spec: dict[str, Any]) -> Callable[[Request], Answer]:
    """Returns the function of a contender."""
    torch.set_num_threads(spec.get("threads", torch.get_num_threads()))
    if spec["kind"] == "machine":
        return measure_machine
    if spec["kind"] == "engine":
        return EngineWork(spec).run
    model = load_model(Path(spec["model"]), dtype=spec["dtype"], device=spec.get("device", "cpu"))
    kinds = {"generate": StaticContender, "generate_batch": ContinuousContender}
    return Work(kinds[spec["kind"]](model)).run


if __name__ == "__main__":
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    answer_requests(make_work(json.loads(sys.argv[1])))
