"""A crowd of clients over some minutes, and all that must be as before when it has gone."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from launched_server import LaunchedServer, Vitals
from load_client import Heard, Told, ask, connect, make_request, read_told
from traffic import COMPLETIONS, Call, Traffic

SLOW_BYTES = 4096
"""Bytes that the system keeps for a slow reader."""
HUNG_SECONDS = 300.0
"""Time after which a request counts as hung."""
MOST_SAMPLED = 200


@dataclass
class Sample:
    """A greedy answer, to be compared with the offline engine's.

    Attributes:
        body: The request.
        texts: Its choices.
    """

    body: dict[str, Any]
    texts: list[str]


@dataclass
class Tally:
    """The answers and statuses that a crowd of clients got.

    Attributes:
        kinds: Requests by kind.
        statuses: Answers by status; 0: the client left before it.
        complaints: What was wrong, one line each.
        first: Seconds to the first token of streams that were read to the end by patient clients.
        gaps: Seconds between tokens of one choice, of the same streams.
        whole: Seconds of whole answers, of all patient clients.
        num_whole: Sound answers that came to their end.
        choices: Choices of them.
        left_choices: Choices of requests whose client left.
        prompt_tokens: Tokens of the prompts of whole answers.
        new_tokens: New tokens of whole answers.
        num_left: Requests whose client left.
        num_refused: Requests that were answered with an error, as they had to be.
        samples: Greedy answers.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    num_whole: int = 0
    choices: int = 0
    left_choices: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    num_left: int = 0
    num_refused: int = 0
    samples: list[Sample] = field(default_factory=list)

    def take(self, call: Call, heard: Heard) -> None:
        """Checks what came back."""
        self.kinds[call.kind if call.body else "malformed"] += 1
        status = heard.status
        self.statuses[status] += 1
        if heard.failure == "left":
            self.num_left += 1
            self.left_choices += call.num_choices
            if status not in (0, 200):
                self._complain(call, f"status {status} before the client left")
            return
        if not heard.is_whole:
            self._complain(call, f"the answer did not end ({heard.failure})")
        elif status not in call.statuses:
            self._complain(call, f"status {status}: {heard.body[:200]!r}")
        elif status != 200:
            self.num_refused += 1
            if complaint := wrong_error(heard):
                self._complain(call, complaint)
        else:
            self._take_sound(call, heard)

    def _take_sound(self, call: Call, heard: Heard) -> None:
        try:
            told = read_told(heard)
        except (ValueError, KeyError) as error:
            self._complain(call, f"no answer that can be read: {error!r}")
            return
        if complaint := wrong_answer(call, told):
            self._complain(call, complaint)
            return
        self.num_whole += 1
        self.choices += call.num_choices
        self.prompt_tokens += told.usage["prompt_tokens"]
        self.new_tokens += told.usage["completion_tokens"]
        if not call.manner.pause:
            self.whole.append(heard.seconds)
            if call.body.get("stream"):
                self.first.append(min(times[0] for times in told.times.values()) - heard.begun)
                self.gaps += [gap for times in told.times.values() for gap in np.diff(times).tolist()]
        if call.body["temperature"] == 0 and len(self.samples) < MOST_SAMPLED:
            self.samples.append(Sample(dict(call.body), [told.texts[index] for index in sorted(told.texts)]))

    def _complain(self, call: Call, complaint: str) -> None:
        self.complaints.append(f"{call.kind}: {complaint}")


def wrong_error(heard: Heard) -> str:
    """Returns what an error object lacks; empty: nothing."""
    body = heard.json()
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or set(error) != {"message", "type", "param", "code"} or not error["message"]:
        return f"an error object is required (got {heard.body[:120]!r})"
    return "a traceback" if "Traceback" in error["message"] else ""


def wrong_answer(call: Call, told: Told) -> str:
    """Returns the fault of a generated answer; empty: there is none."""
    most = call.body["max_tokens"] * call.num_choices
    if told.error is not None:
        return f"an error in the stream: {told.error}"
    if not told.is_done:
        return "a stream without its end"
    if sorted(told.reasons) != list(range(call.num_choices)) or not set(told.reasons.values()) <= {"stop", "length"}:
        return f"choices that all end are required (got {told.reasons})"
    if not told.usage:
        return "numbers of tokens are required (got none)"
    new = told.usage["completion_tokens"]
    if new > most or (new < most and "stop" not in told.reasons.values()):
        return f"{new} tokens of {most}, ended with {told.reasons}"
    if any(stop in text for stop in call.body.get("stop", ()) for text in told.texts.values()):
        return "a stop string in the text"
    if call.body.get("return_tokens") and sum(map(len, told.tokens.values())) < new:
        return f"{sum(map(len, told.tokens.values()))} tokens told of {new}"
    return ""


async def crowd(address: tuple[str, int], make: Callable[[int], Call | None], num_streams: int, tally: Tally) -> None:
    """Lets clients ask until there are no more requests; each asks for its next one when its last has ended.

    Args:
        address: Of the server.
        make: Makes the request of a number; None: there are no more.
        num_streams: Clients at a time.
        tally: Takes what comes.
    """
    numbers = iter(range(1 << 62))

    async def client() -> None:
        wire = None
        while (call := make(next(numbers))) is not None:
            if wire is None or not wire.is_open or call.manner.pause:
                if wire is not None:
                    wire.close()
                wire = await connect(address, SLOW_BYTES if call.manner.pause else None)
            try:
                async with asyncio.timeout(HUNG_SECONDS):
                    heard = await wire.exchange(call.request, call.manner)
            except TimeoutError:
                tally.complaints.append(f"{call.kind}: no end after {HUNG_SECONDS:g} s")
                wire.close()
                continue
            if not heard.reads and heard.failure == "closed":
                # An idle connection may end just when the next request is sent; clients then ask again.
                wire = await connect(address)
                heard = await wire.exchange(call.request, call.manner)
            tally.take(call, heard)
        if wire is not None:
            wire.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(num_streams):
            group.create_task(client())


async def get_json(address: tuple[str, int], path: str) -> Any:
    """Returns an answer as JSON."""
    return json.loads((await ask(address, make_request("GET", path))).body)


async def read_metrics(address: tuple[str, int]) -> dict[str, float]:
    """Returns the numbers of `/metrics`, those of one name added up over their labels but the reason."""
    found: dict[str, float] = {}
    for line in (await ask(address, make_request("GET", "/metrics"))).body.decode().splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            plain, _, labels = name.partition("{")
            reason = labels.partition('finished_reason="')[2].partition('"')[0]
            if "_bucket" not in plain:
                key = f"{plain}:{reason}" if reason else plain
                found[key] = found.get(key, 0.0) + float(value)
    return found


@dataclass(frozen=True)
class Rest:
    """A server at rest.

    Attributes:
        engine: Its engine's state.
        vitals: Of its processes.
        metrics: Its numbers.
    """

    engine: dict[str, Any]
    vitals: dict[str, Vitals]
    metrics: dict[str, float]


async def rest(server: LaunchedServer, seconds: float = 30.0) -> Rest:
    """Waits until a server has no work and no connections, and returns how it is; after a time, how it is then."""
    end = time.monotonic() + seconds
    while True:
        engine = next(iter((await get_json(server.address, "/state"))["engines"].values()))
        await asyncio.sleep(0.5)
        if (not engine["running"] and not engine["waiting"]) or time.monotonic() > end:
            metrics = await read_metrics(server.address)
            await asyncio.sleep(0.5)
            return Rest(engine, server.vitals(), metrics)


async def fill(server: LaunchedServer, main: dict[str, Any]) -> tuple[Tally, int]:
    """Fills all pages with sequences that end at the same time, and returns the most pages in use.

    Prefixes that nobody uses must give their pages back, and each page that has been lost before makes a sequence give
    way.
    """
    tally, page_size = Tally(), main["page_size"]
    rows, pages = fullest(main["num_pages"], main["max_rows"], main["max_context"] // page_size)
    new = min(64, pages * page_size // 2)
    most = 0

    def make(number: int) -> Call | None:
        if number >= rows:
            return None
        prompt = [1 + (7 * number + place * place) % 250 for place in range(pages * page_size - new)]
        body = {"model": main["name"], "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
        return Call("fill", make_request("POST", COMPLETIONS, body), body=body, path=COMPLETIONS)

    async def look() -> None:
        nonlocal most
        while True:
            state = next(iter((await get_json(server.address, "/state"))["engines"].values()))
            most = max(most, state["used_pages"])
            await asyncio.sleep(0.2)

    looking = asyncio.create_task(look())
    try:
        await crowd(server.address, make, rows, tally)
    finally:
        looking.cancel()
    return tally, most


def fullest(num_pages: int, most_rows: int, most_pages: int) -> tuple[int, int]:
    """Returns the number of rows and the pages of each that use the most pages together, with many rows."""
    sizes = [(rows, min(most_pages, num_pages // rows)) for rows in range(1, most_rows + 1)]
    return max(sizes, key=lambda size: (size[0] * size[1], size[0]))


@dataclass
class Soaked:
    """A soak and the server around it.

    Attributes:
        tally: What the crowd has seen.
        seconds: How long it took.
        before: The server at rest before.
        after: The server at rest after it.
        vitals: Each second.
        fills: The fills before and after: their tally, the most pages in use, and the sequences that gave way.
        client_seconds: CPU time of the clients.
    """

    tally: Tally
    seconds: float
    before: Rest
    after: Rest
    vitals: list[dict[str, Vitals]]
    fills: list[tuple[Tally, int, float]]
    client_seconds: float


async def soak(
    server: LaunchedServer, traffic: Traffic, num_streams: int, seconds: float, main: dict[str, Any]
) -> Soaked:
    """Warms a server up, and lets a crowd ask for some time.

    Args:
        server: A server.
        traffic: Makes the requests.
        num_streams: Clients at a time.
        seconds: Time.
        main: State of the model whose rows are filled.
    """

    def until(end: float, first: int) -> Callable[[int], Call | None]:
        return lambda number: traffic.call(first + number) if time.perf_counter() < end else None

    async def filled() -> tuple[Tally, int, float]:
        before = await read_metrics(server.address)
        tally, most = await fill(server, main)
        after = (await rest(server)).metrics
        name = "refold_num_preemptions_total"
        return tally, most, after.get(name, 0.0) - before.get(name, 0.0)

    fills = [await filled()]
    warm_seconds = min(20.0, seconds / 4)
    await crowd(server.address, until(time.perf_counter() + warm_seconds, 1 << 40), num_streams, Tally())
    before = await rest(server)
    tally, vitals = Tally(), []

    async def watch() -> None:
        while True:
            vitals.append(server.vitals())
            await asyncio.sleep(min(1.0, seconds / 20))

    begun, used = time.perf_counter(), time.process_time()
    watching = asyncio.create_task(watch())
    try:
        await crowd(server.address, until(begun + seconds, 0), num_streams, tally)
    finally:
        watching.cancel()
    took, client = time.perf_counter() - begun, time.process_time() - used
    after = await rest(server)
    fills.append(await filled())
    return Soaked(tally, took, before, after, vitals, fills, client)


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """Returns the median and the 99th percentile; zeros where there are no values."""
    if not values:
        return 0.0, 0.0
    low, high = np.percentile(values, (50, 99)).tolist()
    return low, high
