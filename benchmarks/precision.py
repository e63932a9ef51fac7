"""Speed of float32 products by torch's own choice and in `fast_float32`, and of healing steps in float32 and bfloat16.

    python benchmarks/precision.py --threads 1 --write docs/results/precision.md

Both ways run in turns in one process; the medians are reported. The steps are those of the model that ships with refold
(hidden size 256). On processors where `fast_float32` changes nothing both columns are the same.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from page import Page, table

from refold.healing.probe import probe
from refold.nn.processor import MOST_ERROR, fast_float32
from refold.recipe.heal import HealStage
from refold.studies.shipped import shipped_model, training_data

SHAPES = ((1024, 576, 1536), (1024, 1536, 576), (1536, 4096, 1536), (1024, 576, 49152))
"""Rows, inner size and columns: linears, second moments and head of SmolLM2-135M."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    page = Page("Precision", seed=0)
    rows = [measure_product(shape, given.rounds, page) for shape in SHAPES]
    page.section("Products in float32, GFLOP/s", table(["shape", "torch's choice", "fast_float32", "ratio"], rows))
    page.section(
        "Steps of healing, tokens/s", table(["", "float32", "bfloat16", "ratio"], [measure_steps(given.rounds)])
    )
    return page.finish(given.write)


def measure_product(shape: tuple[int, int, int], rounds: int, page: Page) -> list[str]:
    """Returns the row of one shape, and checks that the faster way is as exact."""
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(rows, inner, generator=generator), torch.randn(columns, inner, generator=generator)
    ways: dict[str, Callable[[], object]] = {"plain": nullcontext, "fast": fast_float32}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = one
    for _ in range(rounds):
        for name, way in ways.items():
            with way():  # pyright: ignore[reportGeneralTypeIssues]
                started = time.perf_counter()
                found = one @ other.T
                seconds[name].append(time.perf_counter() - started)
    exact = one.double() @ other.double().T
    error = float((found - exact).norm() / exact.norm())
    page.target(
        f"{rows} x {inner} x {columns} in fast_float32 is exact to {MOST_ERROR:g}", f"{error:.1e}", error <= MOST_ERROR
    )
    plain, fast = (2e-9 * rows * inner * columns / statistics.median(seconds[name]) for name in ways)
    return [f"{rows} x {inner} x {columns}", f"{plain:.0f}", f"{fast:.0f}", f"{fast / plain:.2f}"]


def measure_steps(rounds: int) -> list[str]:
    speeds: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for _ in range(rounds):
        for precision, found in speeds.items():
            fields = {"objective": "next_token", "tokens": 40_960, "batch_tokens": 4096, "context": 256}
            stage = HealStage.model_validate({**fields, "learning_rate": 1e-4, "precision": precision})
            found.append(probe(shipped_model(), training_data(), stage, device="cpu", quiet=True).tokens_per_second)
    plain, fast = map(statistics.median, speeds.values())
    return ["the shipped model", f"{plain:,.0f}", f"{fast:,.0f}", f"{fast / plain:.2f}"]


if __name__ == "__main__":
    raise SystemExit(main())
