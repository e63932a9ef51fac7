"""The server's benchmark: its client, its checks, its page, and a short run with the shipped model."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is required")

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is required")
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module


def exchange(client: ModuleType, answer: Answer, manner: Any = None, request: bytes = b"GET / HTTP/1.1\r\n\r\n") -> Any:
    """Sends a request to a server that answers with a function, and returns what comes."""

    async def run() -> Any:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await answer(reader, writer)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            address = server.sockets[0].getsockname()
            return await asyncio.wait_for(client.ask(address, request, manner or client.PATIENT), 20)

    return asyncio.run(run())


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(text: str, reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": reason, **more}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers in two chunks with some time between, cut at places that are no borders of anything."""
    await reader.readuntil(b"\r\n\r\n")
    usage = b"data: " + json.dumps({"choices": [], "usage": {"completion_tokens": 2}}).encode() + b"\n\n"
    first = STREAM_HEAD + chunk(event("one ", refold_tokens=[{"id": 5}]))
    last = chunk(event("two", "length", refold_tokens=[{"id": 6}, {"id": None}])) + chunk(usage + b"data: [DONE]\n\n")
    for data in (first[:70], first[70:], last[:9], last[9:] + b"0\r", b"\n\r\n"):
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(0.03)


def test_a_stream_is_read_with_the_time_of_each_token(module: Callable[[str], ModuleType]) -> None:
    client = module("load_client")
    heard = exchange(client, stream)
    assert (heard.status, heard.is_whole, heard.failure) == (200, True, "")
    told = client.read_told(heard)
    assert (told.texts, told.reasons, told.tokens) == ({0: "one two"}, {0: "length"}, {0: [5, 6]})
    assert (told.usage, told.is_done, told.error) == ({"completion_tokens": 2}, True, None)
    first, second = told.times[0]
    assert second - first > 0.03
    assert first - heard.begun > 0.02


def test_a_stream_without_its_end_is_not_whole(module: Callable[[str], ModuleType]) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(STREAM_HEAD + chunk(event("one ")))

    client = module("load_client")
    heard = exchange(client, half)
    assert (heard.is_whole, heard.failure) == (False, "closed")
    assert client.read_told(heard).is_done is False


@pytest.mark.parametrize("given", [{"leave_after": 1}, {"abort_at": 0.08}, {"send_share": 0.5, "abort_at": 0.1}])
def test_clients_leave_as_they_are_told(module: Callable[[str], ModuleType], given: dict[str, Any]) -> None:
    lengths: list[int] = []

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            lengths.append(len(await reader.readuntil(b"\r\n\r\n")))
            writer.write(STREAM_HEAD)
            while True:
                writer.write(chunk(event("more")))
                await writer.drain()
                await asyncio.sleep(0.01)
        except (OSError, asyncio.IncompleteReadError):
            lengths.append(-1)

    client = module("load_client")
    heard = exchange(client, endless, client.Manner(**given))
    assert (heard.is_whole, heard.failure) == (False, "left")
    assert (heard.status == 200) == ("send_share" not in given)


def test_an_answer_of_one_piece_is_read(module: Callable[[str], ModuleType]) -> None:
    body = json.dumps({"error": {"message": "n: ...", "type": "a", "param": None, "code": None}}).encode()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 400 Bad Request\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await asyncio.sleep(0.2)

    client, soak = module("load_client"), module("soak")
    heard = exchange(client, refuse, client.Manner(pause=0.01))
    assert (heard.status, heard.is_whole, heard.body) == (400, True, body)
    assert soak.wrong_error(heard) == ""
    heard.reads = [client.Read(0.0, b'HTTP/1.1 400 Bad Request\r\n\r\n{"detail": "no"}')]
    assert "an error object is required" in soak.wrong_error(heard)


SOUND = {"texts": {0: "ab"}, "reasons": {0: "length"}, "usage": {"completion_tokens": 4}, "is_done": True}


@pytest.mark.parametrize(
    ("body", "told", "complaint"),
    [
        ({}, {}, ""),
        ({"stop": ["c"]}, {"reasons": {0: "stop"}, "usage": {"completion_tokens": 2}}, ""),
        ({}, {"is_done": False}, "without its end"),
        ({}, {"error": {"message": "lost"}}, "an error in the stream"),
        ({"n": 2}, {}, "choices that all end"),
        ({}, {"reasons": {0: "abort"}}, "choices that all end"),
        ({}, {"usage": {}}, "numbers of tokens"),
        ({}, {"usage": {"completion_tokens": 5}}, "5 tokens of 4"),
        ({}, {"usage": {"completion_tokens": 3}}, "3 tokens of 4"),
        ({"stop": ["b"]}, {}, "a stop string"),
        ({"return_tokens": True}, {"tokens": {0: [1, 2, 3]}}, "3 tokens told of 4"),
    ],
)
def test_wrong_answers_are_noticed(
    module: Callable[[str], ModuleType], body: dict[str, Any], told: dict[str, Any], complaint: str
) -> None:
    client, soak, traffic = module("load_client"), module("soak"), module("traffic")
    call = traffic.Call("completion", b"", body={"max_tokens": 4, **body})
    found = soak.wrong_answer(call, client.Told(**{**SOUND, **told}))
    assert (complaint in found) if complaint else (found == "")


def test_a_crowd_is_repeatable_and_mixed(module: Callable[[str], ModuleType]) -> None:
    traffic = module("traffic")

    def make(seed: int) -> list[Any]:
        crowd = traffic.Traffic(seed, "some words of a text. " * 200, ["a", "b"], has_chat=True, max_context=256)
        return [crowd.call(number) for number in range(600)]

    calls = make(1)
    assert calls == make(1)
    assert calls != make(2)
    sound = [call for call in calls if call.body]
    assert {call.path for call in sound} == {"/v1/completions", "/v1/chat/completions"}
    assert {call.body["model"] for call in sound} == {"a", "b"}
    assert 0.02 < 1 - len(sound) / len(calls) < 0.09
    assert 0.08 < sum(call.leaves for call in sound) / len(sound) < 0.22
    assert any(call.manner.pause for call in sound)
    assert {"n", "stop", "logprobs", "stream", "seed"} <= {name for call in sound for name in call.body}


@pytest.mark.parametrize(
    ("given", "best"),
    [((170, 32, 16), (17, 10)), ((512, 32, 16), (32, 16)), ((8, 32, 16), (8, 1)), ((100, 1, 8), (1, 8))],
)
def test_pages_are_filled_as_far_as_rows_go(
    module: Callable[[str], ModuleType], given: tuple[int, int, int], best: tuple[int, int]
) -> None:
    assert module("soak").fullest(*given) == best


def test_the_table_of_probes_marks_what_is_not_passed(module: Callable[[str], ModuleType]) -> None:
    probes = module("probes")
    found = [
        (probe, probes.Verdict("404", False) if probe.name == "`/metrics`" else probes.Verdict("400", True))
        for probe in probes.PROBES
    ]
    lines = probes.probe_table(found).splitlines()
    assert lines[0] == "| probe | transformers serve | vLLM 0.32 | refold | refold passes |"
    assert len(lines) == 2 + len(probes.PROBES) == 17
    assert "| `/metrics` | **there is none** | Prometheus | **404** | **no** |" in lines
    assert "| `max_tokens` -1 | **200, no text** | 400, names the field | 400 | yes |" in lines


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(BENCHMARKS / "server.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=290, check=False, env=environment)


@linux
@pytest.mark.long
def test_a_short_soak_writes_its_page(tmp_path: Path) -> None:
    page = tmp_path / "server.md"
    run = bench(
        *("--parts", "soak", "--streams", "6", "--seconds", "2", "--rows", "2", "--write", str(page)),
        *("--work", str(tmp_path / "work")),
    )
    assert "soak: no answer is wrong" in run.stdout, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    # Memory still grows in so short a run.
    missed = [line for line in lines if line.startswith("MISSED") and "memory" not in line]
    assert not missed, run.stdout
    assert "| running | 0 | 0 |" in page.read_text()
    assert "## Soak: 6 clients at a time for" in page.read_text()


@linux
@pytest.mark.long
def test_all_probes_are_passed_and_throughput_is_compared() -> None:
    run = bench("--parts", "probes", "throughput", "--requests", "8", "--rounds", "2", "--rows", "4", "--longest", "24")
    assert "met     all probes are passed: 15 of 15" in run.stdout, run.stdout + run.stderr[-3000:]
    assert "met     tokens through HTTP are the offline engine's" in run.stdout
    assert "streamed throughput is at least 90%" in run.stdout
