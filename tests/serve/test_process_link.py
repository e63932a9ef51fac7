"""An engine in a process of its own: what becomes of jobs when it ends, hangs or cannot be opened."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from refold.errors import RefoldError, SourceError
from refold.generation.sampling import Sampling
from refold.serve import engine_child, process_link
from refold.serve.engine_child import EngineChild
from refold.serve.link import EngineLostError
from refold.serve.messages import GenerationJob, Open, TextPart, TokenPart, write_line
from refold.serve.process_link import ProcessLink

ODD = Path(__file__).parent / "odd_engine.py"
MODEL = "refold/shipped/stdlib-5m"
AT_ONCE, NEVER, STATUS_3, FAILS, GARBAGE, SLOWLY, DEAF, KILLED = range(1, 9)


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_child, "COMMAND", (str(ODD),))


def with_link(link: ProcessLink, body: Callable[[ProcessLink], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        await link.start()
        try:
            return await body(link)
        finally:
            await link.close()

    return asyncio.run(run())


async def ask(link: ProcessLink, kind: int, tokens: int = 3) -> str:
    text = ""
    async with link.answer((kind,), Sampling(max_new_tokens=tokens)) as answer:
        async for part in answer.parts():
            text += part.text
    return text


async def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.usefixtures("odd")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (STATUS_3, "it ended with status 3"),
        (FAILS, "it failed with RuntimeError"),
        (GARBAGE, "it sent no messages"),
        (KILLED, "it was killed"),
        (NEVER, "it told nothing for 1 s"),
    ],
)
def test_open_answers_learn_of_a_lost_engine(kind: int, reason: str) -> None:
    async def body(link: ProcessLink) -> None:
        pid = link.pid
        assert pid is not None
        other = asyncio.create_task(ask(link, SLOWLY, 10_000))
        await asyncio.sleep(0.05)
        # The watchdog hears the other answer as long as that runs.
        if kind == NEVER:
            other.cancel()
        with pytest.raises(EngineLostError, match=reason) as lost:
            await ask(link, kind)
        assert "/" not in str(lost.value)
        if kind != NEVER:
            with pytest.raises(EngineLostError, match=reason):
                await other
        assert link.failure is not None
        await until(link.over.is_set)
        with pytest.raises(EngineLostError, match=reason):
            await ask(link, AT_ONCE)
        assert link.num_open == 0
        assert has_ended(pid)

    with_link(ProcessLink(Open(model="odd"), watchdog_seconds=1.0), body)


@pytest.mark.usefixtures("odd")
def test_a_lost_engine_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(link: ProcessLink) -> None:
        for number in range(1, process_link.MOST_RESTARTS + 1):
            with pytest.raises(EngineLostError):
                await ask(link, KILLED)
            await until(lambda: link.failure is None)
            assert link.num_restarts == number
            assert await ask(link, AT_ONCE) == "0 1 2 "
        with pytest.raises(EngineLostError):
            await ask(link, KILLED)
        await until(link.over.is_set)
        assert link.failure is not None

    with_link(ProcessLink(Open(model="odd"), restart=True), body)


@pytest.mark.usefixtures("odd")
def test_restarts_long_ago_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_link, "RESTART_SECONDS", 0.0)
    monkeypatch.setattr(process_link, "MOST_RESTARTS", 1)

    async def body(link: ProcessLink) -> None:
        for _ in range(3):
            with pytest.raises(EngineLostError):
                await ask(link, KILLED)
            await until(lambda: link.failure is None)
        assert link.num_restarts == 3

    with_link(ProcessLink(Open(model="odd"), restart=True), body)


@pytest.mark.usefixtures("odd")
def test_a_quiet_engine_without_work_is_left_alone() -> None:
    async def body(link: ProcessLink) -> str:
        await asyncio.sleep(0.6)
        return await ask(link, AT_ONCE)

    assert with_link(ProcessLink(Open(model="odd"), watchdog_seconds=0.2), body) == "0 1 2 "


@pytest.mark.usefixtures("odd")
def test_leaving_cancels() -> None:
    async def body(link: ProcessLink) -> None:
        async with link.answer((SLOWLY,), Sampling(max_new_tokens=10_000)) as answer:
            async for _ in answer.parts():
                break
        assert link.num_open == 0
        assert await ask(link, AT_ONCE) == "0 1 2 "

    with_link(ProcessLink(Open(model="odd")), body)


@pytest.mark.usefixtures("odd")
def test_an_engine_that_reads_nothing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_child, "MOST_UNREAD", 1 << 20)

    async def body(link: ProcessLink) -> None:
        waiting = asyncio.create_task(ask(link, DEAF))
        await asyncio.sleep(0.05)
        long = tuple(range(100)) * 1000
        jobs = [link.answer(long, Sampling()) for _ in range(20)]
        for each in jobs:
            await each.__aenter__()
        with pytest.raises(EngineLostError, match="it took no messages"):
            await waiting
        with pytest.raises(EngineLostError, match="it took no messages"):
            await anext(jobs[-1].parts())

    with_link(ProcessLink(Open(model="odd")), body)


@pytest.mark.usefixtures("odd")
def test_faults_of_opening_keep_their_kind() -> None:
    with pytest.raises(SourceError, match="a whole one is required"):
        asyncio.run(ProcessLink(Open(model="broken")).start())


def test_a_process_that_does_not_begin_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_child, "COMMAND", ("-c", "raise SystemExit(7)"))
    with pytest.raises(RefoldError, match=r"engine: a process that starts is required \(it ended with status 7"):
        asyncio.run(ProcessLink(Open(model="odd")).start())


PIECES = """
import socket, sys, time
connection = socket.socket(fileno=int(sys.argv[1]))
lines = bytes.fromhex("LINES")
for start in range(0, len(lines), 700):
    connection.sendall(lines[start : start + 700])
    time.sleep(0.002)
"""


def test_messages_that_come_in_pieces_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b"".join(write_line(TextPart(id=1, choice=0, text=text)) for text in ("é" * 1000, "b"))
    monkeypatch.setattr(engine_child, "COMMAND", ("-c", PIECES.replace("LINES", lines.hex())))

    async def read() -> list[str]:
        child, found = await EngineChild.spawn(), list[str]()
        while (messages := await child.read()) is not None:
            found += [each.text for each in messages if isinstance(each, TextPart)]
        assert await child.end() == "it ended with status 0"
        return found

    assert asyncio.run(read()) == ["é" * 1000, "b"]


def test_infinite_logarithms_come_through() -> None:
    from refold.serve.messages import read_from_engine

    part = TextPart(id=1, choice=0, text="", token=TokenPart(token=1, depth=1, logprob=float("-inf")))
    assert read_from_engine(write_line(part)) == part


STALLED = """
import socket, sys
from refold.serve import engine_process
from refold.serve.messages import TextPart
engine_process.STALLED_SECONDS = 0.3
wire = engine_process.Wire(socket.socket(fileno=int(sys.argv[1])))
print("sends", flush=True)
wire.send([TextPart(id=1, choice=0, text="x" * 50_000_000)])
print("sent", flush=True)
"""


def test_an_engine_does_not_wait_for_ever_for_a_server_that_reads_nothing() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            [sys.executable, "-c", STALLED, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stdout, done.stderr) == (1, "sends\n", "")


def test_a_broken_job_is_refused_alone() -> None:
    """One real engine: jobs, a job that cannot be read, an end while it works, and an end of its server."""

    async def body(link: ProcessLink) -> str:
        assert link.facts.num_depths == 12
        first = await ask(link, 5, 12)
        good = GenerationJob(id=10_000, prompt_ids=(5,), sampling=Sampling())
        assert link._child is not None
        link._child._writer.write(write_line(good).replace(b'"temperature":0.0', b'"temperature":-1.0'))
        assert await ask(link, 5, 12) == first
        assert link.state is not None
        async with link.answer((5,), Sampling(max_new_tokens=300, ignore_eos=True)) as answer:
            await anext(answer.parts())
            assert link.pid is not None
            # A service manager that ends a group reaches the engine too; it goes on.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(link.pid, number)
            async for _ in answer.parts():
                pass
        assert answer.ended is not None
        assert answer.ended.choices[0].reason == "length"
        return first

    assert len(with_link(ProcessLink(Open(model=MODEL, max_rows=2, max_context=512)), body)) > 0


PARENT = """
import asyncio, sys
from refold.serve.messages import Open
from refold.serve.process_link import ProcessLink

async def main():
    link = ProcessLink(Open(model=sys.argv[1]))
    start = asyncio.create_task(link.start())
    while link.pid is None:
        await asyncio.sleep(0.01)
    print(link.pid, flush=True)
    await start
    print("ready", flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.long
@pytest.mark.parametrize("moment", ["loading", "ready"])
def test_a_killed_server_leaves_no_engine(moment: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, MODEL], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if moment == "ready":
        assert parent.stdout.readline() == "ready\n"
    else:
        time.sleep(1.0)
    assert not has_ended(pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while not has_ended(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
