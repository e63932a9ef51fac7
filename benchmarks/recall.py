"""Associative recall and passkey retrieval of small models by mixer.

    python benchmarks/recall.py --write docs/results/recall.md

Two-layer models of one width are trained from scratch on synthetic sequences. Associative recall (arXiv 2312.04927) has
N pairs of a key and a value, and then all keys in another order, each followed by its value, which the model predicts.
Passkey has one marked pair at a random place among filler tokens, and asks for its value at the end. Mixers that only
add to their state store fewer pairs than its size; the delta rule replaces the old value of a key.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from page import Page, table
from torch import Tensor

from refold.families.arch import ArchSpec, Layer, Norm, Rope
from refold.modeling.configuration import RefoldConfig
from refold.modeling.model import RefoldForCausalLM
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe

KEYS, VALUES = 64, 64
MARK, ASK = KEYS + VALUES, KEYS + VALUES + 1
VOCABULARY = KEYS + VALUES + 2
PAIRS = (4, 8, 16, 32)
LENGTHS = (32, 64, 128, 256)
WIDTH, HEADS, LAYERS = 64, 2, 2
IGNORED = -100

MIXERS: dict[str, dict[str, Any]] = {
    "attention": {},
    "window of 16": {"mixers": [{"type": "attention", "window": 16}]},
    "retention": {"mixers": [{"type": "retention"}]},
    "linear attention (hedgehog)": {"mixers": [{"type": "linear_attention"}]},
    "mamba2": {"mixers": [{"type": "mamba2"}]},
    "gla": {"mixers": [{"type": "gla"}]},
    "gated deltanet": {"mixers": [{"type": "gated_deltanet"}]},
    "gated deltanet, attention in layer 1": {"mixers": [{"type": "gated_deltanet", "depths": [0]}]},
}


class Batch(NamedTuple):
    """Tokens and labels; -100: no target."""

    tokens: Tensor
    labels: Tensor


def recall(rows: int, pairs: int, generator: torch.Generator) -> Batch:
    """Draws sequences of associative recall, `[rows, 4 pairs]`."""
    keys = torch.rand(rows, KEYS, generator=generator).argsort(dim=1)[:, :pairs]
    values = KEYS + torch.randint(VALUES, (rows, pairs), generator=generator)
    order = torch.rand(rows, pairs, generator=generator).argsort(dim=1)
    asked, answers = keys.gather(1, order), values.gather(1, order)
    told = torch.stack((keys, values), dim=2).flatten(1)
    tokens = torch.cat((told, torch.stack((asked, answers), dim=2).flatten(1)), dim=1)
    labels = torch.full_like(tokens, IGNORED)
    labels[:, 2 * pairs :: 2] = answers
    return Batch(tokens, labels)


def passkey(rows: int, length: int, generator: torch.Generator) -> Batch:
    """Draws sequences with one marked value among fillers, `[rows, length]`; only the last position has a target."""
    tokens = torch.randint(KEYS, (rows, length), generator=generator)
    places = torch.randint(length - 3, (rows,), generator=generator)
    values = KEYS + torch.randint(VALUES, (rows,), generator=generator)
    each = torch.arange(rows)
    tokens[each, places], tokens[each, places + 1], tokens[:, -1] = MARK, values, ASK
    labels = torch.full_like(tokens, IGNORED)
    labels[:, -1] = values
    return Batch(tokens, labels)


TASKS: dict[str, tuple[Callable[[int, int, torch.Generator], Batch], tuple[int, ...]]] = {
    "associative recall": (recall, PAIRS),
    "passkey": (passkey, LENGTHS),
}


def make_model(recipe: dict[str, Any], seed: int) -> RefoldForCausalLM:
    arch = ArchSpec(
        family="llama",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
        max_position_embeddings=1024,
        layers=tuple(Layer(rope=Rope(rotary_dim=WIDTH // HEADS)) for _ in range(LAYERS)),
        norm=Norm(),
        activation="silu",
        attention_scale=(WIDTH // HEADS) ** -0.5,
        initializer_range=0.05,
    )
    torch.manual_seed(seed)
    blueprint = build_blueprint(arch, load_recipe({**recipe, "weights": "fresh"})).blueprint
    return RefoldForCausalLM(RefoldConfig(blueprint=blueprint.model_dump(mode="json")))


def train(model: RefoldForCausalLM, task: str, given: argparse.Namespace, rate: float, seed: int) -> dict[int, float]:
    """Trains on all sizes in turn, and returns the accuracy for each size on new sequences."""
    draw, sizes = TASKS[task]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    warmup = given.steps // 10

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / given.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for step in range(given.steps):
        size = sizes[step % len(sizes)]
        tokens, labels = draw(max(8, given.batch_tokens // draw(1, size, generator).tokens.shape[1]), size, generator)
        logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    fresh = torch.Generator().manual_seed(10_000 + seed)
    return {size: accuracy(model, draw(128, size, fresh)) for size in sizes}


@torch.no_grad()
def accuracy(model: RefoldForCausalLM, batch: Batch) -> float:
    found = model(input_ids=batch.tokens).logits.argmax(dim=-1)
    asked = batch.labels != IGNORED
    return float((found[asked] == batch.labels[asked]).float().mean())


def run_one(name: str, task: str, given: argparse.Namespace) -> dict[str, Any]:
    """Trains one mixer on one task at every rate, and then every other seed at the best rate."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in f"{task} {name}")
    path = given.work / f"{slug}-{given.steps}.json"
    if not path.exists():
        started, sweep = time.perf_counter(), {}
        for rate in given.rates:
            sweep[rate] = train(make_model(MIXERS[name], given.seeds[0]), task, given, rate, given.seeds[0])
        best = max(sweep, key=lambda rate: sum(sweep[rate].values()))
        runs = [sweep[best]]
        runs += [train(make_model(MIXERS[name], seed), task, given, best, seed) for seed in given.seeds[1:]]
        parameters = sum(each.numel() for each in make_model(MIXERS[name], 0).parameters())
        path.write_text(json.dumps({"rate": best, "runs": runs, "parameters": parameters}) + "\n")
        print(f"{task}, {name}: {runs}, {time.perf_counter() - started:.0f} s", flush=True)
    return json.loads(path.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/recall"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="*", help="mixers whose names hold one of these")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--write", type=Path, help="page to write")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    page = Page("Associative recall and passkey, by mixer", seed=given.seeds[0])
    chosen = [name for name in MIXERS if not given.only or any(part in name for part in given.only)]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for task in given.tasks:
        _, sizes = TASKS[task]
        for name in chosen:
            found[task, name] = run_one(name, task, given)
        rows = [
            [
                name,
                f"{found[task, name]['parameters']:,}",
                f"{found[task, name]['rate']:g}",
                *(" / ".join(f"{run[str(size)]:.0%}" for run in found[task, name]["runs"]) for size in sizes),
            ]
            for name in chosen
        ]
        what = "pairs" if task == "associative recall" else "tokens"
        page.section(
            f"{task.capitalize()}: accuracy by {what}",
            f"{LAYERS} layers, width {WIDTH}, {HEADS} heads, {given.steps} steps of about {given.batch_tokens:,} "
            f"tokens, seeds {', '.join(map(str, given.seeds))}; the best of the rates "
            f"{', '.join(f'{rate:g}' for rate in given.rates)} on the first seed. "
            f"Chance is {1 / VALUES:.1%}.\n\n"
            + table(["mixer", "parameters", "rate", *(f"{size} {what}" for size in sizes)], rows),
        )
    delta = "gated deltanet"
    additive = [name for name in ("retention", "linear attention (hedgehog)") if name in chosen]
    if "associative recall" in given.tasks and delta in chosen and additive:
        most = str(PAIRS[-1])

        def mean(name: str) -> float:
            runs = found["associative recall", name]["runs"]
            return sum(run[most] for run in runs) / len(runs)

        best = max(additive, key=mean)
        page.target(
            f"the delta rule recalls more of {most} pairs than additive states",
            f"{mean(delta):.0%} against {mean(best):.0%} ({best})",
            mean(delta) > mean(best),
        )
    return page.finish(given.write)


if __name__ == "__main__":
    sys.exit(main())
