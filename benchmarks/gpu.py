"""Correctness and speed of refold on one GPU in eight minutes, in parts that can be resumed.

    python benchmarks/gpu.py --write docs/results/gpu.md        (this is `make gpu`)
    python benchmarks/gpu.py --device cpu --work FOLDER         (the rehearsal: tiny sizes, same code)

Each part writes its result into the work folder, and a second run skips finished parts. A part that does not fit the
remaining time is listed on the page as not run.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Before torch is imported: threads that spin while they wait make busy processes on few cores many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import device_engine
import device_parts
import torch
from device_parts import Bench
from page import Page, table

SECONDS = 8 * 60
PARTS = device_parts.PARTS | device_engine.PARTS


@dataclass(frozen=True)
class Outcome:
    """The result of one part: rows of a table, targets, or the reason why it did not run."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    targets: tuple[tuple[str, str, bool], ...]
    seconds: float
    missing: str = ""

    @classmethod
    def read(cls, path: Path) -> "Outcome":
        fields = json.loads(path.read_text())
        return cls(
            tuple(fields["header"]),
            tuple(map(tuple, fields["rows"])),
            tuple((says, measured, met) for says, measured, met in fields["targets"]),
            fields["seconds"],
            fields["missing"],
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the rehearsal, tiny sizes")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--work", type=Path, default=Path("gpu-run"), help="folder of results and models")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for all parts together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="results page to write")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu: a CUDA device is required (got none); `make gpu DEVICE=cpu` rehearses on the CPU", file=sys.stderr)
        return 2
    begun = time.perf_counter()
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.device, options.work, options.seed)
    outcomes = {}
    for name in options.parts:
        left = options.seconds - (time.perf_counter() - begun)
        outcomes[name] = _outcome(name, bench, options.work / f"{name}.json", left)
    return _write(options, bench, outcomes)


def _outcome(name: str, bench: Bench, path: Path, left: float) -> Outcome:
    """Runs a part, or reads its result of an earlier run."""
    part = PARTS[name]
    if path.exists():
        return Outcome.read(path)
    if left < part.seconds:
        return Outcome((), (), (), 0.0, f"not run: about {part.seconds:.0f} s wanted, {max(left, 0):.0f} s left")
    print(f"{name} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    found = part.run(bench)
    outcome = Outcome(found.header, tuple(found.rows), tuple(found.targets), time.perf_counter() - start)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(vars(outcome)))
    temporary.replace(path)
    print(f"{name}: {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
    return outcome


def _write(options: argparse.Namespace, bench: Bench, outcomes: Mapping[str, Outcome]) -> int:
    where = torch.cuda.get_device_name() if options.device == "cuda" else "a CPU (rehearsal)"
    page = Page(f"refold on {where}", options.seed)
    page.section("Sizes", bench.describe())
    for name, outcome in outcomes.items():
        text = outcome.missing or f"{PARTS[name].says}\n\n{table(outcome.header, outcome.rows)}"
        page.section(f"{name} ({outcome.seconds:.0f} s)" if outcome.seconds else name, text)
        for says, measured, met in outcome.targets:
            page.target(says, measured, met)
    return min(1, page.finish(options.write))


if __name__ == "__main__":
    sys.exit(main())
