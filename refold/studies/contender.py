"""Contenders of a bench: engines that answer a workload and say when each request began to speak and ended."""

import abc
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from refold.generation.prompts import pad_left
from refold.generation.sampling import Sampling
from refold.studies.workload import Job, Workload

if TYPE_CHECKING:
    from refold.engine.engine import Engine

PAGE_SIZE = 32
"""Tokens of a page in transformers' continuous batching; its default of 256 suits longer texts."""
MAX_LAUNCH_TOKENS = 512
"""Tokens of a launch in transformers' continuous batching."""


@dataclass(frozen=True)
class Served:
    """One answered request.

    Attributes:
        tokens: New tokens.
        first_token: Seconds from the arrival to the first new token.
        finished: Seconds from the arrival to the last new token.
        depths: For each new token the number of depths that computed it; empty where the contender does not tell.
    """

    tokens: tuple[int, ...]
    first_token: float
    finished: float
    depths: tuple[int, ...] = ()

    @property
    def between_tokens(self) -> float:
        """Mean seconds from one token to the next."""
        return (self.finished - self.first_token) / max(1, len(self.tokens) - 1)


class Contender(abc.ABC):
    """An engine with a loaded model."""

    @abc.abstractmethod
    def serve(self, workload: Workload) -> list[Served]:
        """Answers all requests greedily, end tokens ignored, and returns the answers in order of the requests."""

    def close(self) -> None:  # noqa: B027
        """Gives back threads and memory."""


class EngineContender(Contender):
    """Refold's engine.

    Args:
        engine: The engine. Its `max_rows` must be at least the rows of each workload.
    """

    def __init__(self, engine: "Engine"):
        self.engine = engine

    def serve(self, workload: Workload) -> list[Served]:
        begun = time.perf_counter()
        waiting, running = deque(workload.jobs), {}
        found: dict[int, Served] = {}
        while waiting or running:
            now = time.perf_counter() - begun
            while waiting and waiting[0].arrival <= now and len(running) < workload.rows:
                job = waiting.popleft()
                sampling = Sampling(max_new_tokens=job.num_new, ignore_eos=True)
                request = self.engine.prepare(list(job.prompt), sampling, index=job.index)
                self.engine.submit(request)
                # The time in the queue before a row is free belongs to the request too.
                running[id(request)] = (job, time.perf_counter() - begun - job.arrival)
            if not running:
                time.sleep(max(0.0, waiting[0].arrival - (time.perf_counter() - begun)))
                continue
            for request in self.engine.step():
                job, queued = running.pop(id(request))
                result = self.engine.take(request)
                (choice,) = result.choices
                first, last = (queued + result.seconds[name] for name in ("first_token", "finished"))
                found[job.index] = Served(choice.token_ids, first, last, choice.depths)
        return [found[job.index] for job in workload.jobs]


class StaticContender(Contender):
    """Transformers' `generate` on batches padded on the left; a batch takes all waiting requests, up to the rows.

    Args:
        model: A model of its own: its generation settings are changed.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        model.generation_config = _greedy_settings()

    def serve(self, workload: Workload) -> list[Served]:
        begun = time.perf_counter()
        waiting, found = deque(workload.jobs), {}
        while waiting:
            time.sleep(max(0.0, waiting[0].arrival - (time.perf_counter() - begun)))
            now = time.perf_counter() - begun
            batch: list[Job] = []
            while waiting and waiting[0].arrival <= now and len(batch) < workload.rows:
                batch.append(waiting.popleft())
            if batch:
                found |= dict(zip([job.index for job in batch], self._answer(batch, begun), strict=True))
        return [found[job.index] for job in workload.jobs]

    def _answer(self, batch: list[Job], begun: float) -> list[Served]:
        ids, mask = (each.to(self.model.device) for each in pad_left([job.prompt for job in batch], 0))
        watch = _Watch([job.num_new for job in batch], self.model.device)
        made = self.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(job.num_new for job in batch),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        times = [moment - begun for moment in watch.moments]
        rows = made[:, ids.shape[1] :].tolist()
        return [
            Served(tuple(row[: job.num_new]), times[0] - job.arrival, times[job.num_new - 1] - job.arrival)
            for job, row in zip(batch, rows, strict=True)
        ]


class ContinuousContender(Contender):
    """Transformers' continuous batching.

    Args:
        model: A model of its own: its attention and its generation settings are changed.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        model.generation_config = _greedy_settings()

    def serve(self, workload: Workload) -> list[Served]:
        pages = workload.rows * (workload.longest // PAGE_SIZE + 2)
        settings = ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=pages,
            max_batch_tokens=max(MAX_LAUNCH_TOKENS, workload.rows),
            max_requests_per_batch=workload.rows,
        )
        manager_of: Any = self.model.continuous_batching_context_manager
        # None would warn at each call; no token has the id -1.
        with manager_of(_greedy_settings(end=-1), continuous_batching_config=settings) as manager:
            return self._answer(workload, manager)

    def _answer(self, workload: Workload, manager: Any) -> list[Served]:
        begun = time.perf_counter()
        waiting, jobs, found = deque(workload.jobs), {}, {}
        while len(found) < len(workload.jobs):
            now = time.perf_counter() - begun
            while waiting and waiting[0].arrival <= now:
                job = waiting.popleft()
                name = manager.add_request(
                    list(job.prompt), max_new_tokens=job.num_new, record_timestamps=True, eos_token_id=-1
                )
                jobs[name] = job
            pause = waiting[0].arrival - now if waiting else 1.0
            result = manager.get_result(timeout=max(pause, 1e-3))
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("transformers' continuous batching ended early")
                continue
            if result.error is not None:
                raise RuntimeError(f"transformers' continuous batching: {result.error}")
            if result.is_finished():
                job = jobs[result.request_id]
                times = [moment - begun - job.arrival for moment in result.timestamps]
                found[job.index] = Served(tuple(result.generated_tokens), times[0], times[-1])
        return [found[job.index] for job in workload.jobs]


class _Watch(StoppingCriteria):
    """Notes the time of each step, and ends each row after its own number of tokens."""

    def __init__(self, counts: list[int], device: torch.device):
        self.moments: list[float] = []
        self._counts = torch.tensor(counts, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.moments.append(time.perf_counter())
        return self._counts <= len(self.moments)


def _greedy_settings(end: int | None = None) -> GenerationConfig:
    return GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=end, bos_token_id=None)
