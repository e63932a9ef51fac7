"""Many requests of mixed lengths with cancels, at full memory: nothing leaks, and nobody waits for ever."""

import gc
import random
from typing import Any

import pytest
import torch

from refold.engine.engine import Engine
from refold.engine.exits import ExitRule
from refold.engine.settings import EngineSettings
from refold.generation.sampling import Sampling
from tests.engine.conftest import options


def live_tensors() -> int:
    """Bytes of all tensors that anything still holds."""
    gc.collect()
    return sum(each.nbytes for each in gc.get_objects() if isinstance(each, torch.Tensor))


def soak(model: Any, count: int, share: int, **given: Any) -> None:
    """Runs requests in one `share`-th of the memory that full contexts would take."""
    draw, engine = random.Random(7), Engine(model, EngineSettings(**options(max_rows=8, chunk=32, **given)))
    full = engine.statistics().memory_bytes
    engine = Engine(model, EngineSettings(**options(max_rows=8, chunk=32, memory=full // share, max_wait=16, **given)))
    open_requests, ended, cancelled, sent, before = [], 0, 0, 0, 0
    while sent < count or engine.has_work:
        while sent < count and len(open_requests) < 24:
            prompt = [draw.randrange(2, 95) for _ in range(draw.randrange(1, 24))]
            sampling = Sampling(max_new_tokens=draw.randrange(1, 16), ignore_eos=True, temperature=draw.choice((0, 1)))
            request = engine.prepare(prompt, sampling)
            engine.submit(request)
            open_requests.append(request)
            sent += 1
        for request in engine.step():
            result = engine.take(request)
            open_requests.remove(request)
            ended += 1
            assert result.choices[0].reason in ("length", "cancelled")
        if open_requests and draw.random() < 0.06:
            request = draw.choice(open_requests)
            engine.cancel(request)
            cancelled += 1
        engine._pools.check()
        if ended > count // 4 and not before:
            before = live_tensors()
    assert ended == count
    assert cancelled > count // 40
    report = engine.statistics()
    assert (report.running, report.waiting, report.used_pages) == (0, 0, 0)
    assert report.preemptions > 0
    assert report.longest_wait <= 16 + 8
    engine._pools.drop_prefixes()
    engine._pools.check()
    assert engine.statistics().free_pages == engine._pools.settings.num_pages
    assert live_tensors() <= before * 1.02


@pytest.mark.parametrize(("name", "share"), [pytest.param("relaxed", 20, marks=pytest.mark.long), ("window hybrid", 8)])
def test_a_short_soak(load, name, share):
    soak(load(name), 120, share)


@pytest.mark.long
@pytest.mark.parametrize("preemption", ["recompute", "copy"])
@pytest.mark.parametrize(("name", "share"), [("relaxed", 20), ("window hybrid", 8), ("exits", 20)])
def test_two_thousand_requests(load, name, share, preemption):
    model = load(name)
    exits = ExitRule("top1", {2: 0.2}) if name == "exits" else None
    soak(model, 2000, share, preemption=preemption, exits=exits)
