"""Healing's default batch, learning rate and warm-up, beside grids of batch and learning rate.

    python benchmarks/heal_defaults.py --work heal-defaults --write docs/results/heal-defaults.md

Each run trains one start for one budget and is one JSON file under `--work`; a run whose file is there is not repeated,
so an interrupted study continues. `--grids` chooses some of the studies; the page tells all runs found.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# Before torch is imported: waiting threads that spin make busy processes on few cores many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from page import Page, table

from refold.checkpoint.atomic_file import write_json
from refold.checkpoint.locate import locate
from refold.conversion.convert import convert
from refold.data.readers import DataSource, open_data
from refold.data.split import split
from refold.evaluation.evaluate import evaluate
from refold.evaluation.reference import Reference
from refold.evaluation.settings import EvaluationSettings
from refold.healing.defaults import choose_learning_rate, complete_stage
from refold.healing.heal import heal
from refold.healing.run import HealOptions
from refold.recipe.heal import HealStage
from refold.recipe.load import load_recipe
from refold.studies.shipped import held_out_data, shipped_model, training_data

SEED = 0
WARMUP = 0.05
"""Of all arms but those that compare warm-ups."""
HELD_OUT_EVERY = 20
ALLOWED = 0.1
"""Bits per byte that the default may be behind the best run of a grid."""
FEW_TOKENS = ("calibration.tokens=8192",)


class Arm(NamedTuple):
    """The settings of one run."""

    batch_tokens: int
    learning_rate: float
    warmup: float = WARMUP


@dataclass(frozen=True)
class Grid:
    """Runs of one start for one budget.

    Attributes:
        source: `stories260K`, `books-10m` or `stdlib-5m`.
        recipe: Built-in recipe that makes the start.
        tokens: Training tokens.
        arms: The settings that are compared.
        eval_tokens: Held-out tokens that are scored.
        eval_context: Tokens of a window; None: what `evaluate` takes.
        overrides: Of the recipe's keys.
    """

    source: str
    recipe: str
    tokens: int
    arms: Sequence[Arm]
    eval_tokens: int
    eval_context: int | None = None
    overrides: tuple[str, ...] = ()


def product(batches: Sequence[int], rates: Sequence[float]) -> list[Arm]:
    return [Arm(batch, rate) for batch in batches for rate in rates]


STORIES = {"source": "stories260K", "eval_tokens": 16_384}
BOOKS = {"source": "books-10m", "eval_tokens": 16_384, "eval_context": 256}
GRIDS = {
    "stories-lowrank-20k": Grid(
        **STORIES,
        recipe="lowrank",
        tokens=20_000,
        arms=product((512, 1024, 2048, 4096, 16_384), (1e-4, 3e-4, 1e-3, 2e-3, 4e-3)),
    ),
    "stories-relaxed-20k": Grid(
        **STORIES, recipe="relaxed", tokens=20_000, arms=product((512,), (1e-4, 3e-4, 1e-3, 2e-3, 4e-3))
    ),
    "books-relaxed-20k": Grid(
        source="books-10m", recipe="relaxed", tokens=20_000, arms=product((512,), (8e-4, 2e-3)), eval_tokens=8192
    ),
    "books-relaxed-100k": Grid(
        **BOOKS,
        recipe="relaxed",
        tokens=100_000,
        arms=[Arm(512, 7.9e-4, 0.1)],
        overrides=("relax.rank={parameters: 0.1}",),
    ),
    "stories-lowrank-100k": Grid(
        **STORIES, recipe="lowrank", tokens=100_000, arms=[Arm(512, 2e-3, 0.1), *product((1024, 4096), (2e-3,))]
    ),
    "books-lowrank-20k": Grid(
        **BOOKS, recipe="lowrank", tokens=20_000, arms=product((512,), (2e-4, 8e-4)), overrides=FEW_TOKENS
    ),
    "shipped-relaxed-20k": Grid(
        source="stdlib-5m", recipe="relaxed", tokens=20_000, arms=product((512, 2048), (8e-4,)), eval_tokens=8192
    ),
    "shipped-lowrank-100k": Grid(
        source="stdlib-5m",
        recipe="lowrank",
        tokens=100_000,
        arms=product((512,), (1e-4, 2e-4, 4e-4, 8e-4)),
        eval_tokens=16_384,
    ),
    "stories-warmup-20k": Grid(
        **STORIES, recipe="lowrank", tokens=20_000, arms=[Arm(512, 2e-3, warmup) for warmup in (0.02, 0.1, 0.2)]
    ),
    "books-lowrank-100k": Grid(
        **BOOKS, recipe="lowrank", tokens=100_000, arms=product((512, 2048), (2e-4,)), overrides=FEW_TOKENS
    ),
    "stories-lowrank-1m": Grid(**STORIES, recipe="lowrank", tokens=1_000_000, arms=product((512, 4096), (2e-3,))),
    "books-lowrank-1m": Grid(
        **BOOKS, recipe="lowrank", tokens=1_000_000, arms=product((512, 4096), (2e-4,)), overrides=FEW_TOKENS
    ),
}


@dataclass(frozen=True)
class Material:
    """A source, its training text and its held-out text."""

    model: Path
    train: DataSource
    held_out: DataSource


@cache
def material(source: str) -> Material:
    """Opens a source with its texts; stories are split, a twentieth held out."""
    folder = Path(os.environ.get("REFOLD_MATERIAL", "../shared"))
    if source == "stdlib-5m":
        return Material(shipped_model(), training_data(), held_out_data())
    if source == "stories260K":
        train, held_out = split(open_data([folder / "data/tinystories/sample.txt"]), HELD_OUT_EVERY)
        return Material(folder / "models" / source, train, held_out)
    books = folder / "data/books"
    train, held_out = (open_data([books / f"{side}.parquet"]) for side in ("train", "validation"))
    return Material(folder / "models" / source, train, held_out)


@cache
def reference(source: str) -> Reference:
    """The source's predictions, computed once for all evaluations."""
    return Reference(material(source).model, device="cpu")


def start_folder(grid: Grid, work: Path) -> Path:
    number = zlib.crc32("".join(grid.overrides).encode()) if grid.overrides else 0
    return work / "starts" / f"{grid.source}-{grid.recipe}{f'-{number:08x}' if number else ''}"


def start_figures(grid: Grid, work: Path) -> Path:
    folder = start_folder(grid, work)
    context = f"-{grid.eval_context}" if grid.eval_context else ""
    return folder.with_name(f"{folder.name}-{grid.eval_tokens}{context}.json")


def start(grid: Grid, work: Path) -> Path:
    """Converts the start of a grid once, evaluates it and returns its folder."""
    folder, given = start_folder(grid, work), material(grid.source)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        text = given.train if load_recipe(grid.recipe).weight != "none" else None
        convert(given.model, folder, grid.recipe, grid.overrides, calibration=text)
    figures = start_figures(grid, work)
    if not figures.exists():
        write_json(figures, measure(folder, grid))
    return folder


def measure(model: Path, grid: Grid) -> dict[str, float]:
    """Returns bits per byte of a model on the held-out text, and its difference to the source."""
    given = material(grid.source)
    found = evaluate(
        model,
        given.held_out,
        EvaluationSettings(context=grid.eval_context, max_tokens=grid.eval_tokens, device="cpu"),
        against=reference(grid.source),
    )
    assert found.against is not None
    difference = found.against.difference
    nats = difference * math.log(2) * found.bytes / found.tokens
    return {"bits_per_byte": found.bits_per_byte, "difference": difference, "nats": nats}


def run(grid: Grid, changes: dict[str, Any], path: Path, work: Path) -> None:
    """Trains and evaluates one run and keeps its figures."""
    given, began = material(grid.source), time.perf_counter()
    stage = HealStage.model_validate({"tokens": grid.tokens, "seed": SEED, **changes})
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder) / "healed"
        made = heal(start(grid, work), out, given.train, stage, options=HealOptions(device="cpu", quiet=True))
        figures = measure(out, grid)
        shutil.rmtree(out)
    took = time.perf_counter() - began
    write_json(path, {**changes, **figures, "steps": made.steps, "loss": made.losses["loss"], "seconds": took})
    print(f"{path.parent.name} {path.stem}: {figures['bits_per_byte']:.4f} bits per byte, {took:.0f} s", flush=True)


def run_grid(name: str, work: Path) -> None:
    """Runs the arms of a grid that have no result yet."""
    grid = GRIDS[name]
    for arm in grid.arms:
        path = work / name / f"batch{arm.batch_tokens}-rate{arm.learning_rate:g}-warmup{arm.warmup:g}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            run(grid, arm._asdict(), path, work)


def write_page(work: Path, page: Page) -> None:
    """Adds a table for each grid that has runs, and the target for those with a run near the default."""
    for name, grid in GRIDS.items():
        runs = [json.loads(path.read_text()) for path in sorted((work / name).glob("*.json"))]
        if not runs:
            continue
        runs.sort(key=lambda run: (run["batch_tokens"], run["learning_rate"], run["warmup"]))
        best = min(runs, key=lambda run: run["bits_per_byte"])
        before = json.loads(start_figures(grid, work).read_text())
        rows = [
            [
                f"{run['batch_tokens']:,}",
                f"{run['steps']:,}",
                f"{run['learning_rate']:g}",
                f"{run['warmup']:g}",
                f"**{run['bits_per_byte']:.3f}**" if run is best else f"{run['bits_per_byte']:.3f}",
                f"{run['difference']:+.3f}",
            ]
            for run in runs
        ]
        overrides = "".join(f", `--set '{override}'`" for override in grid.overrides)
        page.section(
            f"{grid.source}, `{grid.recipe}`, {grid.tokens:,} tokens",
            f"Before healing {before['bits_per_byte']:.3f} bits per byte, {before['difference']:+.3f} to the source"
            f"{overrides}; {grid.eval_tokens:,} held-out tokens.\n\n"
            + table(["batch", "steps", "learning rate", "warm-up", "bits per byte", "to the source"], rows),
        )
        default = default_arm(grid, before["nats"])
        chosen = [run for run in runs if is_near(run, default)]
        if chosen and len(runs) > 1:
            behind = min(run["bits_per_byte"] for run in chosen) - best["bits_per_byte"]
            page.target(
                f"{name}: the default (batch {default.batch_tokens:,}, rate {default.learning_rate:g}) within "
                f"{ALLOWED} bits per byte of the best run",
                f"{behind:+.3f}",
                behind <= ALLOWED,
            )


def default_arm(grid: Grid, distance: float) -> Arm:
    """Returns the settings that the rule chooses for a start so many nats per token from its source."""
    model = locate(material(grid.source).model).read_config()
    stage = complete_stage(HealStage(tokens=grid.tokens), model["max_position_embeddings"])
    assert stage.batch_tokens is not None
    assert stage.warmup is not None
    return Arm(stage.batch_tokens, choose_learning_rate(model["hidden_size"], distance), stage.warmup)


def is_near(run: dict[str, Any], default: Arm) -> bool:
    """Says whether a run has the default's batch and, within a tenth, its learning rate."""
    near = abs(run["learning_rate"] / default.learning_rate - 1) <= 0.1
    return near and run["batch_tokens"] == default.batch_tokens


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--grids", nargs="*", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="results page to write, of all runs found")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    page = Page("Defaults of healing, measured", SEED)
    for name in given.grids:
        run_grid(name, given.work)
    write_page(given.work, page)
    return min(1, page.finish(given.write))


if __name__ == "__main__":
    sys.exit(main())
