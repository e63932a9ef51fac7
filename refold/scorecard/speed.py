"""Speed and memory of a model that generates, in turns with its source."""

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import PreTrainedModel

from refold.blueprint.cost import cost
from refold.engine.engine import Engine
from refold.engine.results import Result
from refold.engine.settings import WEIGHTS, EngineSettings
from refold.errors import RefoldError
from refold.generation.sampling import Sampling
from refold.modeling.load import ModelLike
from refold.progress import Report
from refold.scorecard.job import ScoreJob, SectionNotRun
from refold.scorecard.peak_memory import MemoryQuestion, PeakMemory, measure_peak_memory
from refold.scorecard.recall.word_pool import FIRST_PLAIN
from refold.scorecard.record import SpeedSection

WARM_UP = 4
"""New tokens before the clock runs: caches, threads and products settle."""


def measure_speed(job: ScoreJob) -> SpeedSection:
    """Measures first token, tokens per second, weights, state and peak memory.

    Refold's engine runs the model and its source alike, at full depth and without drafts, each from its folder and with
    packed weights as it serves; a source becomes the stack of the empty recipe. Both are in one process and take turns,
    in reversed order every other round; figures are medians over rounds. `refold bench` also measures exits, drafts,
    arrivals and other engines. Peak memory is that of a fresh process for each model.

    Raises:
        SectionNotRun: The engine cannot run the model, its weights in that form, or a text of that length.
    """
    amounts = job.settings.amounts
    positions = job.subject.positions
    room = amounts.prompt_tokens if positions is None else min(amounts.prompt_tokens, positions - amounts.new_tokens)
    if room < 1:
        raise SectionNotRun(f"more than {amounts.new_tokens} positions are required (the model has {positions})")
    numbers = random.Random(job.settings.seed)
    vocabulary = job.subject.num_embeddings
    if job.against is not None:
        vocabulary = min(vocabulary, job.against.vocab_size)
        # It has loaded the source for that, where no text was compared before.
        job.against.let_go()
    rows = (1, *sorted({*amounts.batches} - {1}))
    prompts = [[numbers.randrange(FIRST_PLAIN, vocabulary) for _ in range(room)] for _ in range(rows[-1])]
    plan = _SpeedPlan(prompts, amounts.new_tokens, rows, amounts.repeats, job.subject.model.device)
    wanted = [(job.model, _weights(job, True))]
    if job.against is not None:
        wanted.append((job.against.given, _weights(job, False)))
    with ExitStack() as engines, job.show.progress(f"{job.subject.facts.name}: speed", "runs") as report:
        runners: list[_Runner] = []
        for model, weights in wanted:
            runners.append(_Runner.open(model, weights, plan))
            engines.enter_context(runners[-1].engine)
        _take_turns(runners, plan, report)
        found = [runner.section(plan) for runner in runners]
    if len(found) == 1:
        return found[0]
    ratios = [own / other for own, other in zip(*(runner.speeds for runner in runners), strict=True)]
    return found[0].model_copy(
        update={"against": found[1], "ratio": median(ratios), "ratio_range": _quartiles(ratios)},
    )


@dataclass(frozen=True)
class _SpeedPlan:
    """The work of every model.

    Attributes:
        prompts: As many as the largest number of rows.
        new_tokens: New tokens of each.
        rows: Numbers of prompts that run at once, 1 first.
        repeats: Rounds.
        device: Device of all models.
    """

    prompts: list[list[int]]
    new_tokens: int
    rows: tuple[int, ...]
    repeats: int
    device: torch.device


@dataclass
class _Runner:
    """A model in the engine, and its measured times.

    Attributes:
        engine: The engine.
        weights: Form of its weights, as asked for.
        memory: Its peak memory.
        firsts: Seconds to the first token of each round.
        speeds: Tokens after the first for each second of each round.
        batches: New tokens for each second of each round, by rows.
    """

    engine: Engine
    weights: str
    memory: PeakMemory
    firsts: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    batches: dict[int, list[float]] = field(default_factory=dict)

    @classmethod
    def open(cls, model: ModelLike, weights: str, plan: _SpeedPlan) -> "_Runner":
        context = len(plan.prompts[0]) + plan.new_tokens
        rows = max(plan.rows)
        # Every round has the same prompts: shared prefixes would save their prefill from the second on.
        settings = EngineSettings(
            weights=weights, max_rows=rows, max_context=context, chunk=max(512, rows), share_prefixes=False
        )
        loaded = isinstance(model, PreTrainedModel)
        memory = PeakMemory(why="a model in memory cannot be loaded by a fresh process")
        try:
            if isinstance(model, str | Path):
                question = MemoryQuestion(
                    str(model), weights, str(plan.device), plan.prompts[0], plan.new_tokens, torch.get_num_threads()
                )
                memory = measure_peak_memory(question)
            return cls(Engine(model, settings, device=None if loaded else plan.device), weights, memory)
        except RefoldError as error:
            raise SectionNotRun(str(error)) from None

    def run(self, rows: int, plan: _SpeedPlan) -> None:
        """Answers some prompts at once, and notes the times."""
        begun = time.perf_counter()
        results = self._answer(rows, plan.new_tokens, plan)
        seconds = time.perf_counter() - begun
        self.batches.setdefault(rows, []).append(rows * plan.new_tokens / seconds)
        if rows == 1:
            first, last = (results[0].seconds[name] for name in ("first_token", "finished"))
            self.firsts.append(first)
            self.speeds.append((plan.new_tokens - 1) / (last - first))

    def warm_up(self, rows: int, plan: _SpeedPlan) -> None:
        """Answers some prompts for a few tokens."""
        self._answer(rows, min(WARM_UP, plan.new_tokens), plan)

    def _answer(self, rows: int, new_tokens: int, plan: _SpeedPlan) -> list[Result]:
        return self.engine.generate(plan.prompts[:rows], Sampling(max_new_tokens=new_tokens, ignore_eos=True))

    def section(self, plan: _SpeedPlan) -> SpeedSection:
        """Returns the figures."""
        model, blueprint = self.engine.model, self.engine.model.config.read_blueprint()
        context = len(plan.prompts[0]) + plan.new_tokens
        return SpeedSection(
            prompt_tokens=len(plan.prompts[0]),
            new_tokens=plan.new_tokens,
            first_token=median(self.firsts),
            tokens_per_second=median(self.speeds),
            speed_range=_quartiles(self.speeds),
            peak_memory=self.memory.peak,
            base_memory=self.memory.base,
            weight_bytes=self.engine.statistics().weight_bytes,
            state_bytes=cost(blueprint, model.dtype.itemsize).cache_bytes(context),
            batch_tokens_per_second={rows: median(speeds) for rows, speeds in self.batches.items()},
            notes=(f"peak memory: {self.memory.why}",) if self.memory.why else (),
            repeats=plan.repeats,
            threads=torch.get_num_threads(),
            dtype=str(model.dtype).removeprefix("torch.") if self.weights == "auto" else self.weights,
        )


def _take_turns(runners: Sequence[_Runner], plan: _SpeedPlan, report: Report) -> None:
    done, total = 0, len(plan.rows) * plan.repeats * len(runners)
    for rows in plan.rows:
        for runner in runners:
            runner.warm_up(rows, plan)
        for number in range(plan.repeats):
            for runner in runners if number % 2 == 0 else runners[::-1]:
                runner.run(rows, plan)
                done += 1
                report(done, total)


def _weights(job: ScoreJob, is_rounded: bool) -> str:
    """Returns the form of weights for the engine, from the dtype and the quantisation of the scorecard.

    Args:
        job: The job.
        is_rounded: Whether a quantisation applies, as to the model and not to its source.

    Raises:
        SectionNotRun: The engine has no such form.
    """
    text = job.settings.text
    wanted = text.quantise if is_rounded and text.quantise is not None else text.dtype
    name = "auto" if wanted is None else str(wanted).removeprefix("torch.")
    if name not in WEIGHTS:
        raise SectionNotRun(
            f"weights in one of the engine's forms are required, {', '.join(WEIGHTS)} (got {name}); give another dtype"
        )
    return name


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.25, 0.75]).tolist()
    return low, high
