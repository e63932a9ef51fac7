"""Exits and drafts of healed models in the engine, beside the full depth: speed, depths, FLOPs and differing tokens.

    python benchmarks/engine_exits.py --data held-out.parquet --write docs/results/engine-exits.md MODEL...

All engines of a model are in one process and run in turn. A MODEL has thresholds from `refold calibrate` beside it.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from page import Page, table
from torch.utils.flop_counter import FlopCounterMode

from refold.data.corpus import open_text
from refold.engine.engine import Engine
from refold.engine.settings import Drafts, EngineSettings
from refold.generation.sampling import Sampling
from refold.modeling.load import load_model, load_tokenizer

PROMPT, NEW = 32, 64


def read_prompts(model: Path, data: Path, count: int) -> list[list[int]]:
    """Returns the first tokens of documents."""
    tokenizer, found = load_tokenizer(model), []
    for document in open_text([data]).documents():
        ids = list(tokenizer(document[:2000], add_special_tokens=False)["input_ids"])
        if len(ids) >= PROMPT:
            found.append(ids[:PROMPT])
        if len(found) == count:
            return found
    raise SystemExit(f"{data}: {count} documents of at least {PROMPT} tokens are required (got {len(found)})")


def measure(model: Path, prompts: list[list[int]], batch: int, rounds: int) -> list[dict[str, Any]]:
    """Returns a row for each way to run the model on a batch."""
    loaded: Any = load_model(model, dtype="float32", device="cpu")
    common: dict[str, Any] = {"max_rows": max(batch, 8), "share_prefixes": False, "memory": 128 * 2**20}
    ways = {
        "full depth": {},
        "exits live": {"exits": "calibrated"},
        "drafts by the exit": {"drafts": Drafts(tokens=4)},
        "drafts by the exit, always": {"drafts": Drafts(tokens=4, adapt=False)},
        "looked-up drafts": {"drafts": Drafts("lookup", tokens=4)},
    }
    engines = {name: Engine(model, EngineSettings(**common, **way), device="cpu") for name, way in ways.items()}
    sampling, given = Sampling(max_new_tokens=NEW, ignore_eos=True), prompts[:batch]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            begin = time.perf_counter()
            results[name] = engine.generate(given, sampling)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - begin)
    rows = []
    expected = [result.choices[0].token_ids for result in results["full depth"]]
    for name, engine in engines.items():
        # torch counts no FLOPs of packed products, so this run has plain ones.
        plain = Engine(loaded, EngineSettings(**common, **ways[name]))
        with FlopCounterMode(display=False) as counter:
            plain.generate(given, sampling)
        # The predictions along the full depth's own tokens: a token that differs changes no later one.
        requests = [
            engine.prepare(prompt, Sampling(), forced=tokens) for prompt, tokens in zip(given, expected, strict=True)
        ]
        for request in requests:
            engine.submit(request)
        while engine.has_work:
            engine.step()
        pairs = [
            one != other
            for request, tokens in zip(requests, expected, strict=True)
            for one, other in zip(request.predicted[0], tokens, strict=True)
        ]
        depths = [depth for result in results[name] for depth in result.choices[0].depths]
        full = seconds["full depth"]
        ratios = [one / other for one, other in zip(full, seconds[name], strict=True)]
        rows.append(
            {
                "way": name,
                "tokens per second": batch * NEW / statistics.median(seconds[name]),
                "over full depth": statistics.median(ratios),
                "spread": [min(ratios), max(ratios)],
                "mean depths": statistics.mean(depths),
                "num depths": loaded.config.num_hidden_layers,
                "flops": counter.get_total_flops(),
                "differs": statistics.mean(pairs),
                "acceptance": engine.statistics().acceptance,
                "kv": engine.kv,
            }
        )
    return rows


def write(path: Path, found: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Writes the page, with the numbers as JSON beside it."""
    page = Page("Exits and drafts in the engine", 0)
    for model, batches in found.items():
        for batch, (_, live, adaptive, always, _) in batches.items():
            bound = live["num depths"] / live["mean depths"]
            said, share = (
                f"{model}, {batch} at once: live exits reach 0.9 of the bound",
                live["over full depth"] / bound,
            )
            page.target(said, f"{share:.2f} ({live['over full depth']:.2f} of {bound:.2f})", share >= 0.9)
            slowest = adaptive["over full depth"]
            page.target(f"{model}, {batch} at once: drafts at least 0.95 of plain", f"{slowest:.2f}", slowest >= 0.95)
            if batch == "1" and always["acceptance"] > 0.8:
                gain = always["over full depth"]
                page.target(f"{model}: drafts 1.2 times plain where 80% are accepted", f"{gain:.2f}", gain >= 1.2)
    page.section(
        "How to read it",
        "Float32, two threads; prompts of 32 tokens of held-out documents, 64 new tokens, prefill included. A ratio\n"
        "is the median over rounds, all engines in turn in one process (smallest and largest round in brackets).\n"
        "`bound` is the number of depths over the mean of depths that tokens ran: no exit can save more. FLOPs are\n"
        "those that torch counts in one run. `differs` is the share of tokens that are not the full depth's, each\n"
        "after the full depth's own text. Thresholds are those of `refold calibrate` at a tolerance of 0.05.",
    )
    for model, batches in found.items():
        for batch, rows in batches.items():
            full = rows[0]["flops"]
            cells = [
                [
                    row["way"] + (f" (kv {row['kv']})" if row["way"] == "exits live" else ""),
                    f"{row['tokens per second']:.0f}",
                    f"{row['over full depth']:.2f} ({row['spread'][0]:.2f} to {row['spread'][1]:.2f})",
                    f"{row['mean depths']:.2f}",
                    f"{row['num depths'] / row['mean depths']:.2f}",
                    f"{row['flops'] / full:.2f}",
                    f"{row['differs']:.1%}",
                    f"{row['acceptance']:.0%}" if row["acceptance"] else "-",
                ]
                for row in rows
            ]
            columns = ["", "tokens/s", "over full depth", "mean depths", "bound", "FLOPs", "differs", "accepted"]
            page.section(f"{model}, {batch} at once", table(columns, cells))
    page.finish(path)
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measures models and writes a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(2)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for model in given.models:
        prompts = read_prompts(model, given.data, max(given.batches))
        found[model.name] = {}
        for batch in given.batches:
            found[model.name][str(batch)] = measure(model, prompts, batch, given.rounds)
    write(given.write, found)


if __name__ == "__main__":
    main()
