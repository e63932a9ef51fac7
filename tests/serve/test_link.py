"""Jobs through messages give what the engine gives by itself."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from refold.engine.engine import Engine
from refold.generation.sampling import Sampling
from refold.serve.host import EngineHost
from refold.serve.link import RefusedError, ThreadLink
from refold.serve.messages import (
    GenerationJob,
    StopEngine,
    TextPart,
    WireMessage,
    read_from_engine,
    read_to_engine,
    write_line,
)


@pytest.fixture
def engine(serving_engine: Engine) -> Engine:
    return serving_engine


def test_lines_keep_messages() -> None:
    job = GenerationJob(id=3, prompt_ids=(1, 2), sampling=Sampling(stop="x", logit_bias={3: 1.0}, temperature=0.5))
    assert read_to_engine(write_line(job)) == job
    assert read_to_engine(write_line(StopEngine())) == StopEngine()
    part = TextPart(id=3, choice=0, text="é\n", reason="stop")
    assert write_line(part).count(b"\n") == 1
    assert read_from_engine(write_line(part)) == part


def test_parts_join_to_the_engines_text(engine: Engine) -> None:
    expected = engine.generate("def main(", Sampling(max_new_tokens=24))[0].choices[0]

    async def ask() -> tuple[str, list[int], list[str | None]]:
        link = ThreadLink(lambda send: EngineHost(engine, send))
        await link.start()
        assert engine.tokenizer is not None
        ids: Sequence[int] = engine.prepare("def main(").prompt_ids
        text, tokens, reasons = "", [], []
        async with link.answer(ids, Sampling(max_new_tokens=24), wants_tokens=True) as answer:
            async for part in answer.parts():
                text, reasons = text + part.text, [*reasons, part.reason]
                tokens += [part.token.token] if part.token else []
        assert answer.ended is not None
        assert link.num_open == 0
        async with link.answer(ids, Sampling(exit_depth=99)) as refused:
            with pytest.raises(RefusedError, match="exit_depth"):
                await anext(refused.parts())
        await link.close()
        return text, tokens, reasons

    text, tokens, reasons = asyncio.run(ask())
    assert text == expected.text
    assert tuple(tokens) == expected.token_ids
    assert reasons[-1] == expected.reason
    assert set(reasons[:-1]) == {None}


def test_leaving_cancels(engine: Engine) -> None:
    async def ask() -> int:
        link = ThreadLink(lambda send: EngineHost(engine, send))
        await link.start()
        async with link.answer((1, 2, 3), Sampling(max_new_tokens=200, ignore_eos=True)) as answer:
            async for _ in answer.parts():
                break
        for _ in range(100):
            await asyncio.sleep(0.02)
            if link.state is not None and link.state.running == 0:
                break
        assert link.state is not None
        running = link.state.running
        await link.close()
        return running

    assert asyncio.run(ask()) == 0
    assert not engine.has_work


def test_a_stopped_host_ends_open_jobs(engine: Engine) -> None:
    sent: list[WireMessage] = []
    host = EngineHost(engine, sent.extend)
    host.receive(GenerationJob(id=0, prompt_ids=(1, 2), sampling=Sampling(max_new_tokens=99, ignore_eos=True)))
    host.receive(StopEngine())
    host.run()
    assert sent[-2].kind == "ended" or sent[-1].kind == "ended"  # type: ignore[attr-defined]


def test_a_job_that_cannot_begin_ends_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = engine.prepare

    def fail_once(prompt_ids: Sequence[int], *given: Any, **named: Any) -> Any:
        if prompt_ids == (7,):
            raise ZeroDivisionError
        return prepare(prompt_ids, *given, **named)

    monkeypatch.setattr(engine, "prepare", fail_once)

    async def ask() -> list[tuple[str, int]]:
        link = ThreadLink(lambda send: EngineHost(engine, send))
        await link.start()
        ends = []
        for ids in ((7,), (1, 2)):
            async with link.answer(ids, Sampling(max_new_tokens=3, ignore_eos=True, n=2)) as answer:
                reasons = [part.reason async for part in answer.parts() if part.reason]
            assert answer.ended is not None
            assert {each.reason for each in answer.ended.choices} == set(reasons)
            ends.append((reasons[0], len(answer.ended.choices)))
        await link.close()
        return ends

    assert asyncio.run(ask()) == [("error", 2), ("length", 2)]
