"""The same requests through HTTP and in the offline engine, in turn."""

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from contest import Competitor
from launched_server import LaunchedServer
from load_client import Heard, connect, make_request, read_told
from timing import Timings
from traffic import COMPLETIONS

STREAMED, WHOLE, OFFLINE = "HTTP, streamed", "HTTP, whole answers", "offline engine"
PEERS = Path(__file__).with_name("peers")


@dataclass(frozen=True)
class Batch:
    """The requests of one round.

    Attributes:
        texts: Prompts.
        ids: Their tokens, as the offline engine gets them.
        new: Number of new tokens of each.
        rows: Requests that are open at a time.
    """

    texts: list[str]
    ids: list[list[int]]
    new: list[int]
    rows: int


@dataclass
class Run:
    """One round of one contender.

    Attributes:
        seconds: Wall time.
        cpu: CPU time by process.
        first: Seconds to the first token of each request; empty for the offline engine.
        gaps: Seconds between tokens.
        whole: Seconds of each request.
        tokens: New tokens of each request; empty: they were not asked for.
    """

    seconds: float
    cpu: dict[str, float]
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)


def make_batch(seed: str, text: str, tokenizer: Any, num: int, rows: int, longest: int) -> Batch:
    """Returns requests of mixed lengths, a third of the longest one on average.

    Args:
        seed: Of the draws.
        text: Where prompts are cut from.
        tokenizer: Of the model.
        num: Number of requests.
        rows: Requests that are open at a time.
        longest: Most tokens of a prompt, and most new ones.
    """
    from refold.generation.prompts import encode_prompt

    draw = random.Random(seed)
    texts, ids, new = [], [], []
    while len(texts) < num:
        start, length = draw.randrange(len(text) - 4 * longest), draw.randint(8, 2 * longest)
        prompt = text[start : start + length]
        tokens = encode_prompt(tokenizer, prompt, chat=False)
        if len(tokens) <= longest:
            texts.append(prompt)
            ids.append(tokens)
            new.append(draw.randint(longest // 4, longest))
    return Batch(texts, ids, new, rows)


def offline_engine(model: str, settings: dict[str, Any], log: Path) -> Competitor:
    """Returns the offline engine in a process of its own, which has not begun."""
    spec = {"kind": "engine", "model": model, "settings": settings}
    return Competitor(OFFLINE, [sys.executable, str(PEERS / "own.py"), json.dumps(spec)], log)


def run_offline(engine: Competitor, batch: Batch) -> Run:
    """Runs one round in the offline engine."""
    before = engine.cpu_seconds()
    answer = engine.ask({"prompts": batch.ids, "new": batch.new, "rows": batch.rows, "how": {}})
    cpu = {"engine": engine.cpu_seconds() - before}
    return Run(answer["seconds"], cpu, tokens=answer["tokens"])


async def run_http(
    server: LaunchedServer, model: str, batch: Batch, *, is_streamed: bool, wants_tokens: bool = False
) -> Run:
    """Runs one round through HTTP: `rows` clients, each with one request at a time.

    Args:
        server: The server.
        model: Name of its model.
        batch: The requests.
        is_streamed: Whether answers come in pieces.
        wants_tokens: Whether each piece tells its token; it costs time.
    """
    extra: dict[str, Any] = {"return_tokens": True} if wants_tokens else {}
    if is_streamed:
        extra |= {"stream": True, "stream_options": {"include_usage": True}}
    requests = [
        make_request(
            "POST",
            COMPLETIONS,
            {"model": model, "prompt": text, "max_tokens": new, "temperature": 0, "ignore_eos": True, **extra},
        )
        for text, new in zip(batch.texts, batch.new, strict=True)
    ]
    heard: list[Heard] = [Heard()] * len(requests)
    left = iter(range(len(requests)))

    async def client() -> None:
        wire = await connect(server.address)
        for number in left:
            heard[number] = await wire.exchange(requests[number])
        wire.close()

    before, used = server.vitals(), time.process_time()
    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(batch.rows):
            group.create_task(client())
    seconds = time.perf_counter() - begun
    after = server.vitals()
    cpu = {name: after[name].cpu_seconds - before[name].cpu_seconds for name in after}
    run = Run(seconds, cpu | {"client": time.process_time() - used})
    for each, new in zip(heard, batch.new, strict=True):
        _take(run, each, new, is_streamed)
    return run


def _take(run: Run, heard: Heard, new: int, is_streamed: bool) -> None:
    """Adds one answer to a run.

    Raises:
        ValueError: The answer has another number of tokens or another form than the request asks for.
    """
    told = read_told(heard)
    if heard.status != 200 or not told.is_done or told.usage.get("completion_tokens") != new:
        raise ValueError(f"{new} new tokens are required (got status {heard.status}, {told.usage}, {told.error})")
    times = told.times[0]
    run.whole.append(heard.seconds)
    run.tokens.append(told.tokens[0])
    if is_streamed:
        run.first.append(times[0] - heard.begun)
        run.gaps += np.diff(times).tolist()


@dataclass
class Throughput:
    """Rounds of all contenders.

    Attributes:
        batches: The requests of each round.
        runs: Of each contender, round by round.
        differing: New tokens that differ between HTTP and offline engine, and all new tokens, in the warm-up.
    """

    batches: list[Batch]
    runs: dict[str, list[Run]]
    differing: tuple[int, int]

    def timings(self) -> Timings:
        """Returns seconds per new token of each contender, round by round."""
        return Timings(
            {
                name: [run.seconds / sum(batch.new) for run, batch in zip(runs, self.batches, strict=True)]
                for name, runs in self.runs.items()
            }
        )

    def cpu_per_token(self, name: str, process: str) -> float:
        """Returns microseconds of CPU time per new token of one process."""
        used = sum(run.cpu.get(process, 0.0) for run in self.runs[name])
        return 1e6 * used / sum(sum(batch.new) for batch in self.batches)


async def compare(server: LaunchedServer, model: str, engine: Competitor, batches: Sequence[Batch]) -> Throughput:
    """Runs all contenders in every round, in reversed order every other one. The first batch is the warm-up.

    Args:
        server: The server.
        model: Name of its model.
        engine: The offline engine, which has begun.
        batches: The requests of each round; each has prompts of its own.
    """
    warm, *rounds = batches
    offline, online = (
        run_offline(engine, warm),
        await run_http(server, model, warm, is_streamed=True, wants_tokens=True),
    )
    pairs = zip(offline.tokens, online.tokens, strict=True)
    differing = sum(a != b for one, other in pairs for a, b in zip(one, other, strict=True))
    runs: dict[str, list[Run]] = {name: [] for name in (OFFLINE, STREAMED, WHOLE)}
    for number, batch in enumerate(rounds):
        for name in list(runs) if number % 2 == 0 else list(runs)[::-1]:
            if name == OFFLINE:
                run = await asyncio.to_thread(run_offline, engine, batch)
            else:
                run = await run_http(server, model, batch, is_streamed=name == STREAMED)
            runs[name].append(run)
    return Throughput(list(rounds), runs, (differing, sum(warm.new)))
