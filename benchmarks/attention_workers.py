"""Attention workers: bytes and time for each token with 0, 1 and 2 of them, and the context from which they pay.

    python benchmarks/attention_workers.py --write docs/results/attention-workers.md

All engines share one model of random weights and run in turn, in one process beside the workers. Results stand as JSON
beside the page; `--page-only` makes the page anew from them.
"""

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before torch is imported: waiting threads that spin make busy processes on few cores many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from page import Page, run_facts, table
from timing import Spread
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging
from workplace import workplace

from refold.engine.engine import Engine
from refold.engine.opening import open_model
from refold.engine.settings import AttentionWorkers, EngineSettings
from refold.generation.sampling import Sampling

LAYERS, WIDTH, HEADS, KV_HEADS, VOCAB = 4, 768, 12, 4, 8192
CONTEXTS = (64, 1024)
ROWS, STEPS = 4, 4
ITEM = 4
"""Bytes of a number."""
SETUPS: dict[str, AttentionWorkers | None] = {
    "none": None,
    "1": AttentionWorkers(processes=1, threads=1),
    "2, heads": AttentionWorkers(processes=2, threads=1),
    "2, rows": AttentionWorkers(processes=2, threads=1, split="rows"),
    "1, halves": AttentionWorkers(processes=1, threads=1, overlap=True),
    "2, heads, halves": AttentionWorkers(processes=2, threads=1, overlap=True),
}
"""Name to the workers of an engine."""
LINKS = {
    "10 Gbit/s Ethernet, 50 us": (1.25e9, 50e-6),
    "100 Gbit/s RDMA, 5 us": (12.5e9, 5e-6),
    "NVLink, 450 GB/s, 5 us": (450e9, 5e-6),
}
"""Name to bytes per second and seconds for each message, as their vendors state them; not measured here."""
MEMORIES = {"DDR5 server, 300 GB/s": 300e9, "HBM3, 3.35 TB/s": 3.35e12}
"""Name to bytes per second; not measured here."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the model, kept there (default: temporary)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page-only", action="store_true", help="measure nothing, read the JSON")
    parser.add_argument("--write", type=Path, default=Path("attention-workers.md"), help="results page to write")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = options.write.with_suffix(".json")
    if not options.page_only:
        facts = run_facts(options.seed, os.getloadavg()[0])
        results.write_text(json.dumps({"facts": facts, **measure(options)}, indent=1) + "\n")
    return min(1, make_page(json.loads(results.read_text()), options.seed).finish(options.write))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all engines in turn, and returns seconds for each decoded token and bytes."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2 * max(CONTEXTS),
        tie_word_embeddings=True,
    )
    with workplace(options.work) as work, ExitStack() as stack:
        source = work / "source"
        if not source.exists():
            LlamaForCausalLM(config).save_pretrained(source)
        model = open_model(source, dtype="float32", device="cpu")
        engines = {name: _open(stack, model, workers) for name, workers in SETUPS.items()}
        runs, bytes_of = [], {}
        for context in CONTEXTS:
            generator = torch.Generator().manual_seed(context)
            prompts = [torch.randint(VOCAB, (context,), generator=generator).tolist() for _ in range(ROWS)]
            requests = {name: _begin(engine, prompts, options.rounds) for name, engine in engines.items()}
            for number in range(options.rounds):
                for name in list(engines) if number % 2 else reversed(list(engines)):
                    seconds = _decode(engines[name])
                    runs.append({"workers": name, "context": context, "round": number, "seconds": seconds})
            tokens = {name: _end(engine, requests[name]) for name, engine in engines.items()}
            bytes_of[str(context)] = {"differing": [name for name in engines if tokens[name] != tokens["none"]]}
        for name, engine in engines.items():
            before = engine.statistics()
            tokens_run = before.counts.launched_tokens // len(engine.passes.segments)
            bytes_of[name] = {"tokens": tokens_run, **asdict(before.traffic)}
    return {"runs": runs, "bytes": bytes_of}


def _open(stack: ExitStack, model: Any, workers: AttentionWorkers | None) -> Engine:
    settings = EngineSettings(
        weights="float32", max_rows=ROWS, max_context=2 * max(CONTEXTS), share_prefixes=False, attention_workers=workers
    )
    return stack.enter_context(Engine(model, settings))


def _begin(engine: Engine, prompts: list[list[int]], rounds: int) -> list[Any]:
    """Reads prompts and decodes until all rows are in step."""
    # Rows whose prompts are read first decode while others are read.
    sampling = Sampling(max_new_tokens=STEPS * (rounds + 1) + 32, ignore_eos=True)
    requests = [engine.prepare(each, sampling) for each in prompts]
    for request in requests:
        engine.submit(request)
    while any(request.told is None for request in requests):
        engine.step()
    _decode(engine)
    return requests


def _decode(engine: Engine) -> float:
    """Returns seconds for each step that decodes one token of every row."""
    before = engine.statistics().counts.new_tokens
    began = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    seconds = time.perf_counter() - began
    assert engine.statistics().counts.new_tokens - before == STEPS * ROWS
    return seconds / STEPS


def _end(engine: Engine, requests: list[Any]) -> list[list[int]]:
    """Lets requests end and returns their tokens."""
    while engine.has_work:
        engine.step()
    return [list(engine.take(request).choices[0].token_ids) for request in requests]


def make_page(results: dict[str, Any], seed: int) -> Page:
    """Makes the page of measured results."""
    page = Page("Attention workers", seed, facts=results["facts"])
    size = WIDTH // HEADS
    per_token = {
        "queries": LAYERS * HEADS * size * ITEM,
        "heads": LAYERS * HEADS * size * ITEM,
        "keys": 2 * LAYERS * KV_HEADS * size * ITEM,
    }
    page.section(
        "Sizes",
        f"A decoder of {LAYERS} layers, width {WIDTH}, {HEADS} heads of {size} and {KV_HEADS} key-value heads, random "
        f"weights in float32; {ROWS} sequences decode, {STEPS} tokens in each round. The model and each worker have "
        f"one thread. `halves`: `overlap: true`, by which a launch runs as two halves, one of which computes while the "
        f"other's attention is away.",
    )
    measured = {}
    for name, told in results["bytes"].items():
        if name not in ("none", *map(str, CONTEXTS)):
            measured[name] = {kind: told[kind] / told["tokens"] for kind in (*per_token, "control")}
    rows = [[f"formula: {LAYERS} x (2 x H + 2 x G) x d x {ITEM}", *(f"{each:,}" for each in per_token.values()), ""]]
    rows += [[name, *(f"{each:,.0f}" for each in told.values())] for name, told in measured.items()]
    page.section(
        "Bytes for each token",
        "Read from the channels, prompts included; the last column (headers, positions, changes of block tables) is in "
        "no formula.\n\n" + table(["workers", "queries out", "heads back", "keys and values out", "control out"], rows),
    )
    exact = all(told[kind] == count for told in measured.values() for kind, count in per_token.items())
    page.target("bytes for each token are those of the formula", "equal" if exact else "different", exact)
    differing = sorted({name for context in CONTEXTS for name in results["bytes"][str(context)]["differing"]})
    says = "the same greedy tokens with and without workers"
    page.target(says, f"different with {', '.join(differing)}" if differing else "equal", not differing)
    spreads = {
        (name, context): Spread.of(
            [run["seconds"] for run in results["runs"] if (run["workers"], run["context"]) == (name, context)]
        )
        for name in SETUPS
        for context in CONTEXTS
    }
    rows = [[name, *(_milliseconds(spreads[name, context]) for context in CONTEXTS)] for name in SETUPS]
    page.section(
        "Time of a step",
        f"Milliseconds in which each of {ROWS} sequences gets a token: median (quartiles) of interleaved rounds.\n\n"
        + table(["workers", *(f"context {context:,}" for context in CONTEXTS)], rows),
    )
    page.section("From which context on they pay", _break_even({key: each.median for key, each in spreads.items()}))
    return page


def _break_even(seconds: dict[tuple[str, int], float]) -> str:
    """Returns the break-even contexts: measured for this machine, computed for others."""
    low, high = CONTEXTS
    slope = (seconds["none", high] - seconds["none", low]) / (high - low)
    cost = seconds["1", low] - seconds["none", low]
    here = "The times here are too noisy to say from which context on they would pay."
    if slope > 0 and cost > 0:
        here = (
            f"One step takes {1e6 * slope:.2f} ms more for each 1,000 tokens of context without workers. Two workers "
            f"with processors and memory of their own would halve that: at this machine's speed they pay from "
            f"{cost / (slope / 2):,.0f} tokens of context on."
        )
    size, out = WIDTH // HEADS, 2 * (WIDTH + KV_HEADS * WIDTH // HEADS) * 2
    table_rows = []
    for memory, speed in MEMORIES.items():
        for link, (bandwidth, latency) in LINKS.items():
            # At each layer: 2 G d numbers of bf16 are read for each position and row, and saved for half of them.
            read = 2 * KV_HEADS * size * 2 / speed
            contexts = [(out / bandwidth + 3 * latency / rows) / (read / 2) for rows in (8, 256)]
            table_rows.append([memory, link, *(f"{context:,.0f}" for context in contexts)])
    return (
        f"The way to a worker and back costs {1e3 * cost:.1f} ms of a step at {low} tokens. {here}\n\n"
        f"Arithmetic for other machines, with this model in bf16 and two workers whose memories are as fast as the "
        f"model's: the context from which attention at one layer saves more time than queries, heads, keys and three "
        f"messages cost, without overlap. Speeds are the vendors'.\n\n"
        + table(["memory", "link", "8 rows", "256 rows"], table_rows)
        + "\n\nMore than speed, workers give room: keys and values of a context that the model's device cannot hold."
    )


def _milliseconds(spread: Spread) -> str:
    return f"{1e3 * spread.median:.1f} ({1e3 * spread.low:.1f}-{1e3 * spread.high:.1f})"


if __name__ == "__main__":
    sys.exit(main())
