"""The page of real models: tables of unhealed and healed arms by share, text and task."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from page import Page, table
from real_models_files import Row, most_items, pack, read, read_facts

NO_TEXT = "none"
OWN = "own"
"""Kind of text that the source has written."""
SAME = 2e-5
SCHEMES = ("the source in int8", "the source in int4")
READING = """Differences are bits per byte above the source on the same documents, with the standard error of the paired
difference over documents; below zero is better than the source. `books` and `docs` are held-out texts of the two kinds
of calibration text, `stories` is a kind that no arm was calibrated on. An arm that reads text was calibrated on books
alone, and on books and docs in equal parts (`all`); `-` reads none. Bytes are those of all weights in two bytes each,
embedding included, which no arm makes smaller.

The sources were published as 4-bit integers and are dequantised here. Their weights lie on a 4-bit grid already, so the
row `int4` flatters: rounding to nearly the same grid loses little. A source in bfloat16 would lose more."""

HEALING = """Healed by distillation from the source, on books and docs in equal parts or on text that the source wrote
itself; `calibrated on` is the text of the start. Matrix products are in bfloat16 where the processor has instructions
for it. The last columns are the losses before. Runs of so few tokens show the beginning of healing, not its end."""


def cell(value: dict[str, Any]) -> str:
    """Returns a difference with its error."""
    error = value["error"]
    digits = 3 if abs(value["difference"]) < 1 else 2
    text = f"{value['difference']:+.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def label(row: Row) -> str:
    """Returns the name of an arm; in `starts.py` some names continue the one before."""
    return row["arm"].replace("the same,", "joint tie, ends untied,")


def mean(row: Row) -> float:
    return sum(each["difference"] for each in row["kinds"].values()) / len(row["kinds"])


Key = tuple[str, float, str, int, float, str]
"""Arm, share that was asked for, calibration text; tokens of healing, learning rate and text."""
UNHEALED = (0, 0.0, "")


def key(row: Row) -> Key:
    start = row["arm"], row["asked"], row["calibration"]
    if "tokens" not in row:
        return (*start, *UNHEALED)
    return (*start, row["tokens"], row["rate"], row["healed_on"])


def healed_on(row: Row) -> str:
    """Returns the text of healing."""
    return "the source's own" if row["healed_on"] == OWN else row["healed_on"].replace("+", ", ")


def body(
    rows: Iterable[Row],
    kinds: Sequence[str],
    tasks: dict[Key, Row],
    unhealed: Sequence[Row] | None = None,
) -> list[list[str]]:
    """Returns the lines of one table, the least mean difference first.

    Args:
        rows: The rows.
        kinds: Kinds of text.
        tasks: Scores of tasks.
        unhealed: Rows before healing, whose losses fill further columns; None: these rows are not healed.
    """
    lines, former = [], {key(row): row for row in unhealed or ()}
    for row in sorted(rows, key=mean):
        scored = tasks.get(key(row))
        line = [
            label(row),
            "-" if row["calibration"] == NO_TEXT else row["calibration"],
            f"{row['share']:.0%}",
            f"{row['bytes']:.0%}",
            *(cell(row["kinds"][kind]) for kind in kinds),
        ]
        if unhealed is not None:
            before = former.get((*key(row)[:3], *UNHEALED))
            line += [f"{row['tokens']:,} in steps of {row['batch_tokens']:,}", f"{row['rate']:g}", healed_on(row)]
            line += [cell(before["kinds"][kind]) if before else "" for kind in kinds]
        if tasks:
            line.append("" if scored is None else average(scored, source_of(tasks)))
        lines.append(line)
    return lines


def average(row: Row, source: Row | None = None) -> str:
    """Returns the mean over tasks, with its difference from the source's and the standard error of that over items."""
    found = row["tasks"]
    if source is None or row is source:
        return f"{found['average']:.1%} ± {found['average_error'] or 0.0:.1%}"
    means, variance = [], 0.0
    for one, other in zip(found["tasks"], source["tasks"]["tasks"], strict=True):
        assert (one["name"], one["items"]) == (other["name"], other["items"]), "the same items are required"
        gains = [a - b for a, b in zip(one["right"], other["right"], strict=True)]
        means.append(sum(gains) / len(gains))
        spread = sum((gain - means[-1]) ** 2 for gain in gains) / (len(gains) - 1)
        variance += spread / len(gains)
    error = math.sqrt(variance) / len(means)
    return f"{found['average']:.1%} ({sum(means) / len(means):+.1%} ± {error:.1%})"


def describe(page: Page, name: str, place: Path) -> None:
    """Adds the sections of one model."""
    rows, healed = read(place / "rows"), read(place / "healed")
    tasks = {key(row): row for row in read(most_items(place))}
    facts = json.loads((place / "facts-measure.json").read_text())
    kinds = list(rows[0]["kinds"])
    columns = ["", "calibrated on", "linear weights", "bytes", *kinds]
    integers = [row for row in rows if row["arm"] in SCHEMES]
    made = [row for row in rows if row["arm"] not in SCHEMES]
    first = ", ".join(f"{kind} {source_bits(rows[0], kind):.4f}" for kind in kinds)
    known = place / "identity.json"
    identity = ""
    if known.exists():
        found = json.loads(known.read_text())
        identity, apart = describe_identity(found), found["largest_difference"] / found["largest_logit"]
        is_same = apart <= SAME and all(found["same"].values())
        page.target(
            f"{name}: the identity's logits within 2e-5 of the largest, its tokens the same", f"{apart:.1e}", is_same
        )
    machines = "; ".join(dict.fromkeys(each["machine"] for each in (facts, *read_facts(place))))
    text = (
        f"Bits per byte of the source: {first}; between the runs of this page they differ by at most "
        f"{source_spread([*rows, *healed], kinds):.4f}. Machines: {machines}; {facts['software']}.{identity}"
    )
    page.section(name, text)
    page.section(f"{name}, in integers", table([*columns, *seven(tasks)], body(integers, kinds, tasks)))
    for share in sorted({row["asked"] for row in made}, reverse=True):
        here = [row for row in made if row["asked"] == share]
        lines = body(here, kinds, tasks)
        page.section(f"{name} at {share:.0%} of the linear weights, unhealed", table([*columns, *seven(tasks)], lines))
    if healed:
        lines = body(healed, kinds, tasks, made)
        columns += ["tokens", "learning rate", "healed on", *(f"{kind} before" for kind in kinds), *seven(tasks)]
        page.section(f"{name}, healed", f"{HEALING}\n\n{table(columns, lines)}")
    if tasks:
        page.section(f"{name}, tasks", each_task(tasks.values()))


def describe_identity(row: Row) -> str:
    """Returns a sentence on the fold by the empty recipe beside transformers."""
    same = ", ".join(f"{name} {'the same' if is_same else '**differs**'}" for name, is_same in row["same"].items())
    answer = f'; asked for the capital of France: "{row["answer"]}"' if row["answer"] else ""
    return (
        f"\n\nThe fold by the empty recipe beside transformers in float32: logits differ by at most "
        f"{row['largest_difference']:.1e} (largest logit {row['largest_logit']:.1f}); 64 tokens: {same}{answer}."
    )


def seven(tasks: dict[Any, Row]) -> list[str]:
    return ["seven tasks"] if tasks else []


def source_spread(rows: Sequence[Row], kinds: Sequence[str]) -> float:
    """Returns the largest difference between the source's bits per byte of two rows; each run measures them anew."""
    measured = [[source_bits(row, kind) for row in rows] for kind in kinds]
    return max(max(each) - min(each) for each in measured)


def source_bits(row: Row, kind: str) -> float:
    return row["kinds"][kind]["bits_per_byte"] - row["kinds"][kind]["difference"]


def source_of(tasks: dict[Any, Row]) -> Row | None:
    return next((row for row in tasks.values() if row["arm"] == "the source"), None)


def each_task(found: Iterable[Row]) -> str:
    """Returns the table of every scored model by task."""
    rows = sorted(found, key=lambda row: -row["tasks"]["average"])
    source = source_of(dict(enumerate(rows)))
    names = [task["name"] for task in rows[0]["tasks"]["tasks"]]
    lines = []
    for row in rows:
        by_name = {task["name"]: task for task in row["tasks"]["tasks"]}
        name = label(row) if row["calibration"] == NO_TEXT else f"{label(row)} ({row['calibration']})"
        name += f", healed on {row['tokens']:,} tokens ({healed_on(row)}) at {row['rate']:g}" if "tokens" in row else ""
        share = "" if row["arm"].startswith("the source") else f"{row['asked']:.0%}"
        lines.append([name, share, *(f"{by_name[name]['value']:.1%}" for name in names), average(row, source)])
    chance = {task["name"]: task["chance"] for task in rows[0]["tasks"]["tasks"]}
    lines.append(["chance", "", *("" if chance[name] is None else f"{chance[name]:.1%}" for name in names), ""])
    items = rows[0]["tasks"]["tasks"][0]["num_items"]
    note = (
        f"{items} items of each task, no examples before them. In brackets: the difference from the source on the same "
        f"items, with its standard error over items."
    )
    return note + "\n\n" + table(["", "share", *names, "average"], lines)


def render(work: Path, out: Path | None) -> int:
    """Writes the page of every model under a work folder."""
    places = [place for place in sorted(work.iterdir()) if (place / "facts-measure.json").exists()]
    page = Page("Real models", seed=0)
    page.section("How to read it", READING)
    for place in places:
        describe(page, place.name, place)
    if out is not None:
        pack(places, out.with_suffix(".json"))
    return page.finish(out)
