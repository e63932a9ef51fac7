"""Sections and targets of the server's page."""

import statistics
from collections.abc import Sequence

from launched_server import LaunchedServer, Vitals
from page import Page, table
from server_throughput import OFFLINE, STREAMED, WHOLE, Run, Throughput
from soak import Soaked, percentiles
from timing import ROUNDS, Spread

PROCESSES = ("http", "engine")
GROWTH = 0.05
"""Largest rise of resident memory between the first third of the soak and its end."""
RATIO = 0.90


def start_section(page: Page, server: LaunchedServer) -> None:
    """Tells how long a server took to start, and how big it is."""
    vitals = server.vitals()
    rows = [[name, f"{vitals[name].resident / 2**20:.0f} MiB", str(vitals[name].threads)] for name in PROCESSES]
    told = server.line.partition("; ")[2]
    page.section(
        "Start",
        f"Ready {server.seconds:.1f} s after the command: {told}.\n\n"
        + table(["process", "resident memory when ready", "threads"], rows),
    )


def soak_section(
    page: Page, soaked: Soaked, differing: tuple[list[str], int], names: Sequence[str], num_streams: int, log: str
) -> None:
    """Tells about a soak, and sets its targets.

    Args:
        page: Takes the section.
        soaked: The soak.
        differing: Greedy answers that are not the offline engine's, and the number of those that stand at ties.
        names: Models that were asked for.
        num_streams: Clients at a time.
        log: What the server wrote to its log.
    """
    tally = soaked.tally
    num = sum(tally.kinds.values())
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in tally.kinds.most_common())
    statuses = ", ".join(f"{status} {count:,}" for status, count in sorted(tally.statuses.items()) if status)
    figures = [
        ["requests", f"{num:,}"],
        ["by kind", kinds],
        ["left by their clients", f"{tally.num_left:,}"],
        ["statuses", statuses],
        ["models asked for", ", ".join(names)],
        ["new tokens of whole answers per second", f"{tally.new_tokens / soaked.seconds:,.0f}"],
        *([name, "{:.2f} s, {:.2f} s".format(*percentiles(values))] for name, values in _times(soaked)),
        ["CPU time of the clients", f"{soaked.client_seconds:.0f} s"],
    ]
    page.section(
        f"Soak: {num_streams} clients at a time for {soaked.seconds:.0f} s",
        f"{table(['', ''], figures)}\n\n{_rest_text(soaked)}\n\n{_complaints(tally.complaints + differing[0], log)}",
    )
    bad = sum(count for status, count in tally.statuses.items() if status >= 500)
    page.target(
        "soak: no answer is wrong, late or without an end", f"{len(tally.complaints)} are", not tally.complaints
    )
    page.target("soak: no status of 500 or above", str(bad), bad == 0)
    page.target(
        "soak: greedy answers are the offline engine's, ties apart",
        f"{len(tally.samples) - len(differing[0])} of {len(tally.samples)}, {differing[1]} at ties",
        len(differing[0]) == differing[1] and bool(tally.samples),
    )
    num_tracebacks = log.count("Traceback")
    page.target("soak: no traceback in the log, from start to end", str(num_tracebacks), num_tracebacks == 0)
    _rest_targets(page, soaked)


def _times(soaked: Soaked) -> list[tuple[str, list[float]]]:
    tally = soaked.tally
    named = (("first token", tally.first), ("between tokens", tally.gaps), ("end to end", tally.whole))
    return [(f"{name}, median and 99th percentile", values) for name, values in named]


def _rest_text(soaked: Soaked) -> str:
    before, after, fills = soaked.before, soaked.after, soaked.fills
    rows = [
        [name, *(str(each.engine[name]) for each in (before, after))]
        for name in ("running", "waiting", "used_pages", "free_pages")
    ]
    for process in PROCESSES:
        for name in ("files", "threads"):
            told = [str(getattr(each.vitals[process], name)) for each in (before, after)]
            rows.append([f"{name} of the {process} process", *told])
    rows.append(["most pages in use when all rows are filled", *(str(most) for _, most, _ in fills)])
    rows.append(["sequences that give way then", *(f"{count:.0f}" for _, _, count in fills)])
    return (
        f"{table(['at rest', 'before', 'after'], rows)}\n\n"
        f"{table(['MiB in each sixth of the soak', *'123456'], _courses(soaked.vitals))}\n\n"
        "Prefixes that later prompts may share keep their pages, but pages of prefixes that nobody uses count as free. "
        "To tell them from lost pages, all pages are filled with sequences, before and after: prefixes must give "
        "theirs back, and a lost page would make a sequence give way. The target of memory compares the median of the "
        "first third of the soak, after a warm-up by the same crowd, with that of its last twelfth."
    )


def _complaints(lines: Sequence[str], log: str) -> str:
    told = "\n".join(f"    {line[:300]}" for line in lines[:20])
    noise = f"The log of the server has {len(log.splitlines())} lines."
    return f"{noise}\n\nWrong:\n\n{told}" if lines else noise


def _resident(vitals: Sequence[dict[str, Vitals]], process: str) -> tuple[float, float]:
    values = [each[process].resident for each in vitals]
    third, twelfth = max(1, len(values) // 3), max(1, len(values) // 12)
    return statistics.median(values[:third]), statistics.median(values[-twelfth:])


def _courses(vitals: Sequence[dict[str, Vitals]]) -> list[list[str]]:
    sixths = [vitals[len(vitals) * part // 6 : max(len(vitals) * (part + 1) // 6, 1)] for part in range(6)]
    return [
        [
            f"{name} process",
            *(f"{statistics.median(each[name].resident for each in sixth) / 2**20:.0f}" for sixth in sixths),
        ]
        for name in PROCESSES
    ]


def _rest_targets(page: Page, soaked: Soaked) -> None:
    before, after = soaked.before, soaked.after
    engine = after.engine
    page.target(
        "soak: nothing runs or waits at its end",
        f"{engine['running']} run, {engine['waiting']} wait",
        not engine["running"] and not engine["waiting"],
    )
    (_, most, gave), (filled, most_after, gave_after) = soaked.fills
    is_same = (most, gave) == (most_after, gave_after) and not filled.complaints
    page.target("soak: no page is lost", f"{most_after} of {most} in use when rows are filled", is_same)
    for name in ("files", "threads"):
        rises = [getattr(after.vitals[each], name) - getattr(before.vitals[each], name) for each in PROCESSES]
        page.target(f"soak: no more {name} than before", ", ".join(f"{rise:+d}" for rise in rises), max(rises) <= 0)
    for process in PROCESSES:
        early, late = _resident(soaked.vitals, process)
        growth = late / early - 1
        page.target(f"soak: memory of the {process} process grows by at most 5%", f"{growth:+.1%}", growth <= GROWTH)
    complaints = metric_complaints(soaked)
    page.target("soak: the counters of /metrics add up", "; ".join(complaints) or "they do", not complaints)


def metric_complaints(soaked: Soaked) -> list[str]:
    """Returns what does not add up between the counters of a server and what its clients have seen.

    Answers of clients that left may count as ended or as left, so counters have a range.
    """
    before, after, tally = soaked.before.metrics, soaked.after.metrics, soaked.tally

    def rise(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    success = "refold_request_success_total"
    ended = rise(f"{success}:stop") + rise(f"{success}:length")
    aborted = sum(rise(name) for name in after if name.startswith(f"{success}:")) - ended
    engine = rise("refold_engine_tokens_total")
    ranges = {
        "choices that ended": (ended, tally.choices, tally.choices + tally.left_choices),
        "choices that were left": (aborted, 0, tally.left_choices),
        "choices of all kinds": (ended + aborted, tally.choices, tally.choices + tally.left_choices),
        "tokens of prompts": (rise("refold_prompt_tokens_total"), tally.prompt_tokens, float("inf")),
        "new tokens": (rise("refold_generation_tokens_total"), tally.new_tokens, engine),
        "requests with an end": (
            rise("refold_e2e_request_latency_seconds_count"),
            tally.num_whole,
            tally.num_whole + tally.num_left,
        ),
        "requests with an error": (rise("refold_request_rejections_total"), 0, tally.num_refused + tally.num_left),
    }
    return [
        f"{name}: {value:.0f} is not in {low:.0f}..{high:.0f}"
        for name, (value, low, high) in ranges.items()
        if not low <= value <= high
    ]


def throughput_section(page: Page, found: Throughput) -> None:
    """Tells the tokens per second of all contenders, and sets the target."""
    timings = found.timings()
    rows = []
    for name in (OFFLINE, STREAMED, WHOLE):
        # A ratio of seconds per token is the inverse of a ratio of throughput.
        ratio = Spread.of([1 / each for each in _ratios(timings.seconds, name)])
        cpu = [f"{found.cpu_per_token(name, process):.0f}" for process in ("engine", "http", "client")]
        speed = Spread.of([1 / seconds for seconds in timings.seconds[name]])
        rows.append([name, f"{speed.median:,.0f} ({speed.low:,.0f} to {speed.high:,.0f})", _spread(ratio), *cpu])
    header = ["", "tokens/s", "ratio", "CPU µs per token: engine", "HTTP process", "clients"]
    num, rounds = sum(found.batches[0].new), len(found.batches)
    text = (
        f"{len(found.batches[0].new)} requests a round, {found.batches[0].rows} open at a time, {num:,} new tokens in "
        f"the first of {rounds} rounds; prompts differ from round to round. Medians with quartiles; ratios within each "
        "round. Through HTTP prompts are texts; the offline engine gets their tokens."
    )
    page.section("Throughput", f"{text}\n\n{table(header, rows)}\n\n{_latencies(found)}")
    streamed = Spread.of([1 / each for each in _ratios(timings.seconds, STREAMED)])
    said = f"{_spread(streamed)}" + ("" if rounds >= ROUNDS else f", in {rounds} rounds only")
    page.target("streamed throughput is at least 90% of the offline engine's", said, streamed.median >= RATIO)
    differing, of = found.differing
    page.target("tokens through HTTP are the offline engine's", f"{of - differing:,} of {of:,} are", differing == 0)


def _ratios(seconds: "dict[str, list[float]] | object", name: str) -> list[float]:
    assert isinstance(seconds, dict)
    return [a / b for a, b in zip(seconds[name], seconds[OFFLINE], strict=True)]


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _latencies(found: Throughput) -> str:
    def told(runs: Sequence[Run], name: str) -> str:
        values = [value for run in runs for value in getattr(run, name)]
        return "{:.0f}, {:.0f}".format(*(1000 * each for each in percentiles(values))) if values else "-"

    rows = [
        [name, *(told(found.runs[name], each) for each in ("first", "gaps", "whole"))] for name in (STREAMED, WHOLE)
    ]
    return table(["ms, median and 99th percentile", "first token", "between tokens", "end to end"], rows)
