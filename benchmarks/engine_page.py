"""The results page of the engine's benchmark, made from its JSON: tables, and every target with its figure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest import BUSY, Case
from engine_contenders import DRAFTS, FULL, LIVE, LOSSLESS, REPLAY
from page import Page, table
from roofline import Roofline, lora_share
from timing import Spread

MIB = 2**20
BASE, EXACT = "generate, bfloat16", "generate, float32"
CASES = {
    "b1": "one request",
    "b8": "8 requests of equal lengths",
    "b32": "32 requests of equal lengths",
    "m8": "mixed lengths, 8 rows",
    "m32": "mixed lengths, 32 rows",
}
PEERS = ("generate", "llama.cpp", "CTranslate2")
"""Beginnings of names of other engines, `generate_batch` included."""


@dataclass(frozen=True)
class Results:
    """All that one work folder holds.

    Attributes:
        facts: Of the run.
        machine: Bytes and FLOPs per second.
        parts: For each part its cases by name.
        roofline: Of the shape on this machine.
        lora: Share of LoRAs of rank 64 in the weights of the shape.
    """

    facts: dict[str, str]
    machine: dict[str, float]
    parts: dict[str, dict[str, Case]]
    roofline: Roofline
    lora: float

    @classmethod
    def read(cls, work: Path, facts: dict[str, str]) -> "Results":
        """Reads a work folder."""
        machine = json.loads((work / "machine.json").read_text())
        parts: dict[str, dict[str, Case]] = {}
        for file in sorted(work.glob("*-[bm][0-9]*.json")):
            part, _, name = file.stem.rpartition("-")
            parts.setdefault(part, {})[name] = Case.read(file)
        for part, cases in parts.items():
            parts[part] = {name: cases[name] for name in CASES if name in cases}
        config = json.loads((work / "source" / "config.json").read_text())
        return cls(facts, machine, parts, Roofline(config, machine), lora_share(config, rank=64))

    def save(self, path: Path) -> None:
        """Writes every figure without the tokens."""
        cases = {
            part: {
                name: {
                    "prompts": len(case.request["prompts"]),
                    "new_tokens": case.num_new,
                    "rows": case.request["rows"],
                    "other_processes": case.others,
                    "commit": case.commit,
                    "failures": case.failures,
                    "notes": case.notes,
                    "contenders": {
                        who: {
                            "seconds": case.seconds(who),
                            "peak_bytes": case.peak(who),
                            "extra": {key: value for key, value in case.extra(who).items() if key != "depths"},
                        }
                        for who in case.answers
                    },
                }
                for name, case in found.items()
            }
            for part, found in self.parts.items()
        }
        path.write_text(json.dumps({"facts": self.facts, "machine": self.machine, "parts": cases}, indent=1) + "\n")


def write(results: Results, seed: int, path: Path | None) -> int:
    """Writes the page and the JSON beside it; returns 1 if a target is missed."""
    page = Page("The engine beside transformers, llama.cpp and CTranslate2", seed, results.facts)
    page.section("How to read it", introduction(results))
    shape = results.parts.get("shape", {})
    shape_targets(page, results, shape)
    for name, case in shape.items():
        page.section(f"88M shape, random weights: {CASES[name]}", shape_table(results, case, name))
    for part, cases in results.parts.items():
        if part == "shape":
            continue
        title = part.removeprefix("exits-")
        exit_targets(page, title, cases)
        for name, case in cases.items():
            page.section(f"Healed model {title}: {CASES[name]}", exit_table(case))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        results.save(path.with_suffix(".json"))
    return min(1, page.finish(path))


def introduction(results: Results) -> str:
    """Returns how it was measured, with the machine's rates and a warning if other processes ran."""
    rates = results.machine
    text = (
        "Every contender has a process of its own with the same number of threads; one process runs at a time, the "
        "others are stopped. Medians over rounds, quartiles in brackets; a ratio is taken within each round. Prefill, "
        "head and sampling are inside the clock, loading is not. Memory is the peak of the whole process, with "
        "Python and libraries where it has them. Greedy, end tokens ignored.\n\n"
        f"The machine reads {max(rates['read'], rates['copy']) / 1e9:.1f} GB/s and multiplies "
        f"{rates['float32'] / 1e9:.0f} GFLOP/s in float32 and {rates['bfloat16'] / 1e9:.0f} in bfloat16 "
        "(PyTorch, this run). "
        "The share of the roofline is the least time that these rates allow, over the measured time; every depth "
        "counts as a read of its weights, so that a block that stays in cache can exceed 100%. Equal text: share of "
        "tokens before the first that differs from those of `generate` in float32; random weights nearly tie often, so "
        "that rounding shows at once."
    )
    busy = {
        f"{part} {name}": case.others
        for part, cases in results.parts.items()
        for name, case in cases.items()
        if case.others > BUSY
    }
    commits = {case.commit for cases in results.parts.values() for case in cases.values()}
    if len(commits) > 1:
        text += f"\n\n**The cases are of several commits: {', '.join(sorted(commits))}.**"
    if busy:
        worst = ", ".join(f"{name} {share:.0%}" for name, share in busy.items())
        text += f"\n\n**Other processes took part of the machine's time ({worst}): do not quote these times.**"
    return text


def shape_table(results: Results, case: Case, name: str) -> str:
    """Returns the table of one case on the shape."""
    rows = []
    for who in case.answers:
        speed = speeds(case, who)
        share = results.roofline.share(case, who, speed) if name[0] == "b" else None
        rows.append(
            [
                who,
                f"{speed.median:.1f} ({speed.low:.1f} to {speed.high:.1f})",
                _ratio(case, who, BASE),
                f"{case.peak(who) / MIB:.0f}",
                "-" if share is None else f"{share:.0%}",
                _overhead(case, who),
                _equal(case, who),
            ]
        )
    header = [
        "contender",
        "tokens/s",
        f"over {BASE}",
        "memory, MiB",
        "of the roofline",
        "outside the model",
        "equal text",
    ]
    return table(header, rows) + _failed(case)


def shape_targets(page: Page, results: Results, cases: dict[str, Case]) -> None:
    """Adds the targets on the shape."""
    one = cases.get("b1")
    if one is not None:
        for weights, least in (("bfloat16", 1.5), ("int8", 2.0), ("int4", 4.0)):
            goal(
                page,
                one,
                f"batch 1, {weights}: at least {least:g} times `generate` in bfloat16",
                ours(weights),
                BASE,
                least,
            )
        says = "batch 1, int4: at least 0.5 of llama.cpp's Q4_0 (stretch 0.8)"
        goal(page, one, says, ours("int4"), "llama.cpp, Q4_0", 0.5)
    for name, least in (("b8", 1.0), ("b32", 1.0), ("m8", 1.5), ("m32", 1.5)):
        for weights in ("bfloat16", "float32"):
            if name in cases:
                says = f"{CASES[name]}, {weights}: at least {least:g} times padded `generate`"
                goal(page, cases[name], says, ours(weights), f"generate, {weights}", least)
    for name in ("b8", "b32", "m8", "m32"):
        for weights in ("bfloat16", "float32"):
            if name in cases:
                best = best_peer(cases[name], weights)
                says = f"{CASES[name]}, {weights}: at least 0.9 of the best peer (stretch 1.2): {best or 'none'}"
                goal(page, cases[name], says, ours(weights), best or "", 0.9)
    for name in ("b1", "b32"):
        if name in cases:
            lora_target(page, cases[name], name, results.lora)
    if "b32" in cases:
        case, who = cases["b32"], ours("bfloat16")
        if who in case.answers:
            share = overhead(case, who)
            page.target("scheduling and bookkeeping at batch 32: under 10% of the time", f"{share:.1%}", share < 0.1)


def lora_target(page: Page, case: Case, name: str, share: float) -> None:
    """Adds the target on the cost of LoRA."""
    relaxed, strict = "refold, relaxed, bfloat16", "refold, strict, bfloat16"
    if relaxed not in case.answers or strict not in case.answers:
        return
    cost = ratio(case, strict, relaxed).median - 1
    page.target(
        f"{CASES[name]}: LoRA of rank 64 costs at most 1.3 times its share of bytes ({share:.0%})",
        f"{cost:.0%} more time, {cost / share:.2f} times",
        cost <= 1.3 * share,
    )


def exit_table(case: Case) -> str:
    """Returns the table of one case on a healed model."""
    rows = []
    full = case.tokens(FULL) if FULL in case.answers else None
    for who in case.answers:
        speed, extra = speeds(case, who), case.extra(who)
        loops = depth_ratio(extra) if "run_depths" in extra else 1.0
        flops = case.notes.get("flops", {})
        differs = case.notes.get("differs", {})
        labelled = f"{who} (replay)" if who.startswith(REPLAY) else who
        rows.append(
            [
                labelled,
                f"{speed.median:.1f} ({speed.low:.1f} to {speed.high:.1f})",
                _ratio(case, who, FULL),
                f"{1 / loops:.0%}" if "run_depths" in extra else "-",
                f"{flops[who] / flops[FULL]:.2f}" if who in flops and FULL in flops else "-",
                f"{differs[who]:.1%}" if who in differs else "-",
                "-" if full is None else f"{equal_share(case.tokens(who), full):.1%}",
                f"{extra['acceptance']:.0%}" if who in DRAFTS and "acceptance" in extra else "-",
                f"{case.peak(who) / MIB:.0f}",
            ]
        )
    header = [
        "contender",
        "tokens/s",
        f"over {FULL}",
        "mean depths",
        "FLOPs",
        "tokens that differ",
        "equal text",
        "accepted",
        "memory, MiB",
    ]
    note = (
        "\n\nMean depths: of new tokens, over all depths. FLOPs: counted by PyTorch's counter over the whole request, "
        "over those of full depth. Tokens that differ: from full depth's, each predicted along full depth's own text. "
        "Equal text: share of tokens before the first that differs, in free generation. Accepted: share of drafted "
        "tokens."
    )
    return table(header, rows) + note + _failed(case)


def exit_targets(page: Page, title: str, cases: dict[str, Case]) -> None:
    """Adds the targets on a healed model with exits."""
    for name, case in cases.items():
        if FULL not in case.answers:
            continue
        for who in case.answers:
            if who.startswith(LIVE):
                loops = depth_ratio(case.extra(who))
                gain = ratio(case, who, FULL).median
                differs = case.notes.get("differs", {}).get(who, float("nan"))
                page.target(
                    f"{title}, {CASES[name]}, {who.removeprefix('refold, ')}: at least 90% of the ratio of depths",
                    f"{gain:.2f} of {loops:.2f} times, {gain / loops:.0%}; {differs:.1%} of tokens differ",
                    gain >= 0.9 * loops,
                )
                _flops_target(page, title, name, case, who)
        _lossless_target(page, title, name, case)


def _flops_target(page: Page, title: str, name: str, case: Case, who: str) -> None:
    flops = case.notes.get("flops", {})
    if who in flops and FULL in flops:
        found, takes = flops[who] / flops[FULL], depth_ratio(case.extra(who)) > 1.005
        says = f"{title}, {CASES[name]}, {who.removeprefix('refold, ')}: exits compute less (FLOPs counted by PyTorch)"
        page.target(says, f"{found:.2f} of full depth's", found < 1 or not takes)


def _lossless_target(page: Page, title: str, name: str, case: Case) -> None:
    if LOSSLESS not in case.answers:
        return
    gain, acceptance = ratio(case, LOSSLESS, FULL).median, case.extra(LOSSLESS).get("acceptance", 0.0)
    equal = equal_share(case.tokens(LOSSLESS), case.tokens(FULL))
    page.target(f"{title}, {CASES[name]}, lossless drafts: tokens of full depth", f"{equal:.1%} equal", equal == 1)
    if name == "b1" and acceptance > 0.8:
        says, least = f"{title}, batch 1, lossless drafts: at least 1.2 times full depth", 1.2
    else:
        says, least = f"{title}, {CASES[name]}, lossless drafts: at most 5% slower than without", 1 / 1.05
    page.target(says, f"{gain:.2f} times, {acceptance:.0%} accepted", gain >= least)


def goal(page: Page, case: Case, says: str, who: str, over: str, least: float) -> None:
    """Adds the target that one contender is at least so many times as fast as another."""
    if who not in case.answers or over not in case.answers:
        page.target(says, "not measured", False)
        return
    found = ratio(case, who, over)
    page.target(says, f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})", found.median >= least)


def ours(weights: str) -> str:
    """Returns the name of the engine on the source."""
    return f"refold, source, {weights}"


def best_peer(case: Case, weights: str) -> str | None:
    """Returns the fastest other engine at a dtype."""
    formats = {"float32": "F32", "bfloat16": "BF16"}
    names = [
        who
        for who in case.answers
        if who.startswith(PEERS) and (who.endswith(weights) or who == f"llama.cpp, {formats[weights]}")
    ]
    return max(names, key=lambda who: speeds(case, who).median, default=None)


def speeds(case: Case, who: str) -> Spread:
    """Returns new tokens per second."""
    return Spread.of([case.num_new / seconds for seconds in case.seconds(who)])


def ratio(case: Case, who: str, over: str) -> Spread:
    """Returns how many times as fast one contender is as another, within rounds."""
    pairs = zip(case.seconds(over), case.seconds(who), strict=True)
    return Spread.of([theirs / own for theirs, own in pairs])


def equal_share(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> float:
    """Returns the share of tokens before the first that differs."""
    equal = 0
    for row, other in zip(found, wanted, strict=True):
        equal += next((index for index, (a, b) in enumerate(zip(row, other, strict=False)) if a != b), len(other))
    return equal / sum(map(len, wanted))


def depth_ratio(extra: dict[str, Any]) -> float:
    """Returns all depths over the mean number of depths that new tokens ran."""
    return extra["num_depths"] * extra["ended_tokens"] / extra["run_depths"]


def overhead(case: Case, who: str) -> float:
    """Returns the share of the time outside the model, sampling included."""
    extra = case.extra(who)
    outside = extra["sampling_seconds"] + extra["other_seconds"]
    return outside / (outside + extra["model_seconds"])


def _overhead(case: Case, who: str) -> str:
    return f"{overhead(case, who):.0%}" if "model_seconds" in case.extra(who) else "-"


def _equal(case: Case, who: str) -> str:
    """Returns the share of tokens of the exact contender; folds are other models."""
    if EXACT not in case.answers or (who.startswith("refold") and "source" not in who):
        return "-"
    return f"{equal_share(case.tokens(who), case.tokens(EXACT)):.0%}"


def _ratio(case: Case, who: str, over: str) -> str:
    if over not in case.answers:
        return "-"
    found = ratio(case, who, over)
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def _failed(case: Case) -> str:
    return "".join(f"\n\nNot measured: {who}: `{' '.join(said.split())[-300:]}`" for who, said in case.failures.items())
