"""Probes of a server: requests that other servers answer wrongly, and how the answers of each are told."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from launched_server import LaunchedServer
from load_client import Heard, Manner, ask, make_request, read_told
from page import table
from soak import get_json, read_metrics, wrong_error
from traffic import COMPLETIONS

PEERS = ("transformers serve", "vLLM 0.32")
SOURCE = (
    "The two columns of other servers are measurements of ours, made once, on loopback with the same tiny Llama: "
    "`transformers serve` 5.23 with continuous batching on the CPU, and vLLM 0.32 on the CPU. refold's column is "
    "written from the answers of the servers of this run. **Bold**: the probe is not passed."
)
KEY = "a key of the probes"
QUEUE_LIMIT = 4
"""Answers that the strict server lets in at a time."""
AT_ONCE = 12


class Verdict(NamedTuple):
    """An answer of ours.

    Attributes:
        told: In words.
        passed: Whether it is right.
    """

    told: str
    passed: bool


class Probed(NamedTuple):
    """The servers that are probed.

    Attributes:
        open: With the defaults, and an empty cache of the hub.
        strict: With a key, one row and a short queue.
        model: Name of their model.
        max_context: Of the model.
    """

    open: LaunchedServer
    strict: LaunchedServer
    model: str
    max_context: int

    async def complete(self, **fields: Any) -> Heard:
        """Asks the open server for a completion."""
        body = {"model": self.model, "prompt": "def", "max_tokens": 8, "temperature": 0, **fields}
        return await ask(self.open.address, make_request("POST", COMPLETIONS, body))


class Probe(NamedTuple):
    """A row of the table.

    Attributes:
        name: What is asked.
        peers: Answers of the other servers; with a `!` in front: not passed.
        run: Asks ours.
    """

    name: str
    peers: tuple[str, str]
    run: Callable[[Probed], Awaitable[Verdict]]


def _error(heard: Heard) -> dict[str, Any]:
    body = heard.json()
    return body["error"] if isinstance(body, dict) and isinstance(body.get("error"), dict) else {}


def _brief(heard: Heard) -> str:
    error = _error(heard)
    if not error:
        return str(heard.status)
    names = [f"`{error[name]}`" for name in ("param", "code") if error.get(name)]
    return f"{heard.status}" + (f" ({', '.join(names)})" if names else "")


def _is_error(heard: Heard, status: int, *needles: str) -> bool:
    told = _error(heard).get("message", "")
    return heard.status == status and not wrong_error(heard) and all(each in told for each in needles)


async def _empty_prompt(probed: Probed) -> Verdict:
    heard = await probed.complete(prompt="")
    after = await probed.complete()
    told = "text of the model" if heard.status == 200 else "clear"
    is_right = heard.status == 200 or _is_error(heard, 400, "prompt")
    return Verdict(f"{_brief(heard)}, {told}; the next request: {after.status}", is_right and after.status == 200)


async def _long_prompt(probed: Probed) -> Verdict:
    heard = await probed.complete(prompt=[1] * (3 * probed.max_context))
    told = _error(heard).get("message", "").replace(",", "")
    is_told = str(3 * probed.max_context) in told and str(probed.max_context) in told
    return Verdict(f"{_brief(heard)}, with both lengths" if is_told else _brief(heard), heard.status == 400 and is_told)


async def _negative(probed: Probed) -> Verdict:
    heard = await probed.complete(max_tokens=-1)
    return Verdict(_brief(heard), _is_error(heard, 400, "max_tokens") and _error(heard)["param"] == "max_tokens")


async def _temperature(probed: Probed) -> Verdict:
    both = [await probed.complete(temperature=value) for value in (99, "hot")]
    return Verdict(" / ".join(map(_brief, both)), all(_is_error(each, 400, "temperature") for each in both))


async def _fields(probed: Probed) -> Verdict:
    plain = read_told(await probed.complete()).texts[0]
    letter = next((each for each in plain if each.isalnum()), plain[-1:])
    stopped = read_told(await probed.complete(stop=letter)).texts[0]
    likely = (await probed.complete(logprobs=2)).json()["choices"][0]["logprobs"]
    many = read_told(await probed.complete(n=2))
    echoed = read_told(await probed.complete(echo=True)).texts[0]
    refused = await probed.complete(best_of=3)
    right = {
        "stop": stopped == plain[: plain.index(letter)],
        "logprobs": 0 < len(likely["tokens"]) == len(likely["token_logprobs"]),
        "n": sorted(many.texts) == [0, 1],
        "echo": echoed == "def" + plain,
    }
    names = [name for name, is_right in right.items() if is_right]
    told = f"honoured: {', '.join(names)}; `best_of`: {refused.status} with the reason"
    return Verdict(told, all(right.values()) and _is_error(refused, 400, "best_of"))


async def _unknown_field(probed: Probed) -> Verdict:
    heard = await probed.complete(temprature=1)
    return Verdict(f"{_brief(heard)}, names it", _is_error(heard, 400, "temprature"))


async def _unknown_model(probed: Probed) -> Verdict:
    both = [await probed.complete(model=name) for name in ("nobody", "../../etc/passwd")]
    return Verdict(" / ".join(map(_brief, both)), all(_is_error(each, 404, "model") for each in both))


async def _bad_json(probed: Probed) -> Verdict:
    heard = await ask(probed.open.address, make_request("POST", COMPLETIONS, b'{"model": '))
    return Verdict(_brief(heard), _is_error(heard, 400, "JSON"))


async def _models(probed: Probed) -> Verdict:
    heard = await ask(probed.open.address, make_request("GET", "/v1/models"))
    names = [each["id"] for each in (heard.json() or {}).get("data", [])]
    return Verdict(str(heard.status), heard.status == 200 and probed.model in names)


async def _metrics(probed: Probed) -> Verdict:
    heard = await ask(probed.open.address, make_request("GET", "/metrics"))
    if heard.status != 200:
        return Verdict(str(heard.status), False)
    found = await read_metrics(probed.open.address)
    return Verdict(f"Prometheus, {len(found)} numbers", found.get("refold_generation_tokens_total", 0) > 0)


async def _routes(probed: Probed) -> Verdict:
    requests = make_request("GET", "/v2/answers"), make_request("GET", COMPLETIONS)
    both = [await ask(probed.open.address, each) for each in requests]
    is_right = _is_error(both[0], 404) and _is_error(both[1], 405) and "allow" in both[1].headers
    return Verdict(" / ".join(map(_brief, both)), is_right)


def _keyed(probed: Probed, body: dict[str, Any] | None, key: str | None = KEY) -> bytes:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    full = None if body is None else {"model": probed.model, "temperature": 0, "ignore_eos": True, **body}
    return make_request("GET" if body is None else "POST", "/metrics" if body is None else COMPLETIONS, full, headers)


async def _wrong_key(probed: Probed) -> Verdict:
    body = {"prompt": "def", "max_tokens": 2}
    wrong, none, right = [
        await ask(probed.strict.address, _keyed(probed, body, key)) for key in ("a wrong one", None, KEY)
    ]
    told = f"wrong: {_brief(wrong)}; none: {_brief(none)}; right: {right.status}"
    return Verdict(told, _is_error(wrong, 401) and _is_error(none, 401) and right.status == 200)


async def _crowded(probed: Probed) -> Verdict:
    address = probed.strict.address
    request = _keyed(probed, {"prompt": [5] * 8, "max_tokens": probed.max_context // 2})
    heard = await asyncio.gather(*(ask(address, request) for _ in range(AT_ONCE)))
    counts = Counter(each.status for each in heard)
    refused = [each for each in heard if each.status == 429]
    slowest = max((each.seconds for each in refused), default=0.0)
    text = (await ask(address, _keyed(probed, None))).body.decode()
    lines = [line for line in text.splitlines() if line.startswith("refold_request_rejections_total")]
    num_counted = sum(float(line.rpartition(" ")[2]) for line in lines if "queue" in line)
    is_told = all("retry-after" in each.headers and not wrong_error(each) for each in refused)
    told = f"{counts[200]} served, {counts[429]} x 429 within {slowest * 1000:.0f} ms, counter at {num_counted:.0f}"
    is_right = counts == {200: QUEUE_LIMIT, 429: AT_ONCE - QUEUE_LIMIT} and is_told
    return Verdict(told, is_right and num_counted == AT_ONCE - QUEUE_LIMIT)


async def _hang_up(probed: Probed) -> Verdict:
    body = {"model": probed.model, "prompt": "def", "max_tokens": probed.max_context - 16, "ignore_eos": True}
    request = make_request("POST", COMPLETIONS, body | {"stream": True})
    heard = await ask(probed.open.address, request, Manner(leave_after=3))
    begun = time.perf_counter()
    while (running := await _running(probed)) and time.perf_counter() - begun < 10:
        await asyncio.sleep(0.02)
    seconds = time.perf_counter() - begun
    told = f"running count back to {running} after {seconds:.1f} s"
    return Verdict(told, heard.status == 200 and not running and seconds <= 1.0)


async def _running(probed: Probed) -> int:
    return next(iter((await get_json(probed.open.address, "/state"))["engines"].values()))["running"]


async def _terminate(probed: Probed) -> Verdict:
    before = len(probed.strict.stderr)
    seconds, status = await asyncio.to_thread(probed.strict.terminate)
    said = probed.strict.stderr[before:]
    is_clean = not any(word in said for word in ("Traceback", "leaked", "Error"))
    told = f"exits in {seconds:.1f} s with status {status}, {'no noise' if is_clean else 'noise in the log'}"
    return Verdict(told, status == 0 and is_clean)


PROBES = (
    Probe("empty prompt", ("!503, and no request is answered after it", "400, clear"), _empty_prompt),
    Probe(
        "prompt three times over the context",
        ("!200, goes on past the last position", "400, with both lengths"),
        _long_prompt,
    ),
    Probe("`max_tokens` -1", ("!200, no text", "400, names the field"), _negative),
    Probe('`temperature` 99 / "hot"', ("!200 / 500 without a body that tells why", "400 / 400"), _temperature),
    Probe("`stop`, `logprobs`, `n`, `echo`", ("!without effect, silently", "honoured, or 400 and why"), _fields),
    Probe("unknown field", ("!422, `detail`", "!taken silently"), _unknown_field),
    Probe("unknown model / `../../` as model", ("!400, `detail`", "404, error object"), _unknown_model),
    Probe("JSON that is cut off", ("!422, `detail`", "400, error object"), _bad_json),
    Probe("`/v1/models` without a hub cache", ("!500", "200"), _models),
    Probe("`/metrics`", ("!there is none", "Prometheus"), _metrics),
    Probe("unknown route / wrong method", ("!`detail`", "!`detail`, not OpenAI's shape"), _routes),
    Probe("wrong key", ("!no keys", "!401, not OpenAI's shape"), _wrong_key),
    Probe(
        f"{AT_ONCE} requests at once, {QUEUE_LIMIT} allowed",
        ("!no limit by default", "4 served, 8 x 503 within 20 ms, counter raised"),
        _crowded,
    ),
    Probe("client hangs up in a stream", ("cancels (read in its code)", "running count 0 within 1 s"), _hang_up),
    Probe("SIGTERM", ("not tried", "!exits in 1.8 s, leaked semaphores in the log"), _terminate),
)


async def run_probes(probed: Probed) -> list[tuple[Probe, Verdict]]:
    """Asks all that there is; one that fails in another way is not passed."""
    found = []
    for probe in PROBES:
        try:
            verdict = await probe.run(probed)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            verdict = Verdict(f"{type(error).__name__}: {error}"[:100], False)
        found.append((probe, verdict))
    return found


def probe_table(found: list[tuple[Probe, Verdict]]) -> str:
    """Returns the table of all servers."""
    rows = []
    for probe, verdict in found:
        peers = [f"**{each[1:]}**" if each.startswith("!") else each for each in probe.peers]
        ours = verdict.told if verdict.passed else f"**{verdict.told}**"
        rows.append([probe.name, *peers, ours, "yes" if verdict.passed else "**no**"])
    return table(["probe", *PEERS, "refold", "refold passes"], rows)
