"""Memory of conversion, its time compared with a copy of the bytes, and its SVD compared with LAPACK's.

    python benchmarks/convert.py --write docs/results/convert.md

Makes checkpoints of TinyLlama-1.1B's shape with 22 and 44 layers (at most 7 GB on disk). They are in a temporary
folder, or in the folder of --work, which keeps them for the next run.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Before torch is imported: waiting threads that spin make busy processes on few cores many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from memory import INTERVAL, ProcessRun, run_python
from page import Page, table
from timing import ROUNDS, Timings, interleave
from tinyllama_shaped import LINEARS, Linear, make_checkpoint
from workplace import workplace

from refold.calibration.svd import truncated_svd
from refold.checkpoint.atomic_file import flush
from refold.checkpoint.locate import PLAN_NAME
from refold.checkpoint.reader import CheckpointReader
from refold.conversion.convert import convert

RANK = 64
RELAXED = ("--recipe", "relaxed", "--set", f"relax.rank={RANK}")
MIB = 2**20
SAME_WITHIN, ALLOWED_MEMORY, ALLOWED_COPIES, SPEEDUP, KEPT = 0.05, 10**9, 1.5, 5.0, 0.99


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for checkpoints, kept there (default: temporary)")
    parser.add_argument("--seed", type=int, default=0, help="of the checkpoints' weights")
    parser.add_argument("--layers", type=int, nargs=2, default=[22, 44], help="layers of the two checkpoints, even")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of each timing, five or more")
    parser.add_argument("--parts", nargs="+", choices=("memory", "strict", "svd"), default=["memory", "strict", "svd"])
    parser.add_argument("--write", type=Path, help="results page to write")
    options = parser.parse_args()
    page = Page("Conversion, measured", options.seed)
    layers = options.layers[0]
    with workplace(options.work) as work:
        relaxed: ProcessRun | None = None
        if "memory" in options.parts:
            relaxed = measure_memory(page, work, options.layers, options.seed)
        if "strict" in options.parts:
            measure_strict(page, _checkpoint(work, layers, options.seed), work, options.rounds)
        if "svd" in options.parts:
            measure_svd(page, _checkpoint(work, layers, options.seed), layers, options.rounds, relaxed)
    return min(1, page.finish(options.write))


def measure_memory(page: Page, work: Path, layers: Sequence[int], seed: int) -> ProcessRun:
    """Measures the peak anonymous memory of `refold convert`, and returns the run of the smaller checkpoint."""
    bare = run_python(["-c", "pass"])
    imports = run_python(["-c", "import refold.conversion.convert"])
    runs, kept = {}, {}
    for depth in layers:
        source, out = _checkpoint(work, depth, seed), work / "relaxed"
        runs[depth] = run_python(["-m", "refold", "convert", str(source), str(out), *RELAXED])
        kept[depth] = json.loads((out / PLAN_NAME).read_text())["kept_energy"]
        shutil.rmtree(out)
    rows = [
        ["`python -c pass`", _mib(bare.peak), "", ""],
        ["`import refold.conversion.convert`", _mib(imports.peak), _mib(imports.peak - bare.peak), ""],
        *(
            [f"`refold convert`, {depth} layers", _mib(run.peak), _mib(run.peak - bare.peak), f"{run.seconds:.1f}"]
            for depth, run in runs.items()
        ),
    ]
    page.section(
        "Memory",
        f"`refold convert SOURCE OUT {' '.join(RELAXED)}` on TinyLlama-1.1B's shape in bf16, in a process of its own. "
        f"Anonymous resident memory (`RssAnon`), read from outside every {INTERVAL * 1e3:.0f} ms "
        f"({min(run.looks for run in runs.values()):,} times and more); mapped source files do not count.\n\n"
        + table(["process", "peak, MiB", "over bare, MiB", "seconds with imports"], rows)
        + "\n\n"
        + _kept_table(kept[layers[0]]),
    )
    over = [runs[depth].peak - bare.peak for depth in layers]
    difference = abs(over[1] / over[0] - 1)
    page.target(
        f"relaxed, rank {RANK}: the same peak within {SAME_WITHIN:.0%} for {layers[0]} and {layers[1]} layers",
        f"{difference:.1%} apart over the bare interpreter",
        difference <= SAME_WITHIN,
    )
    page.target(
        "that peak under 1 GB over the bare interpreter (imports counted as conversion's own)",
        f"{max(over) / 1e9:.2f} GB",
        max(over) < ALLOWED_MEMORY,
    )
    return runs[layers[0]]


def measure_strict(page: Page, source: Path, work: Path, rounds: int) -> None:
    """Measures strict conversion beside copies of the source's and of the target's bytes."""
    out, copied, reference = work / "strict", work / "copy", work / "reference"
    convert(source, reference, "recursive")

    def prepare() -> None:
        for folder in (out, copied):
            shutil.rmtree(folder, ignore_errors=True)
        # What earlier rounds left to be written is on disk before the clock starts.
        os.sync()

    timings = interleave(
        {
            "copy of the source": lambda: _copy(source, copied),
            "copy of the target": lambda: _copy(reference, copied),
            "strict conversion": lambda: convert(source, out, "recursive"),
        },
        rounds,
        prepare=prepare,
    )
    sizes = {"copy of the source": _size(source), "copy of the target": _size(reference)}
    sizes["strict conversion"] = sizes["copy of the target"]
    prepare()
    shutil.rmtree(reference)
    copies = ("copy of the source", "copy of the target")
    rows = [
        [name, f"{sizes[name] / 1e9:.2f}", _seconds(timings, name), *(_ratio(timings, name, copy) for copy in copies)]
        for name in sizes
    ]
    page.section(
        "Strict conversion beside a copy",
        f"`recursive` on the smaller checkpoint against plain copies (`shutil.copyfile` and fsync of every file), "
        f"{timings.rounds} rounds, interleaved; the source is in the page cache for all. Conversion also hashes every "
        f"byte for the manifest. It writes half the bytes, so the copy of its target is the stricter measure.\n\n"
        + table(["", "GB written", "seconds", "over copy of the source", "over copy of the target"], rows),
    )
    for name in copies:
        ratio = timings.ratio("strict conversion", name)
        page.target(
            f"strict conversion at most {ALLOWED_COPIES} times a {name}",
            f"{ratio.median:.2f} times ({ratio.low:.2f} to {ratio.high:.2f})",
            ratio.median <= ALLOWED_COPIES,
        )


def measure_svd(page: Page, source: Path, layers: int, rounds: int, relaxed: ProcessRun | None) -> None:
    """Measures the truncated SVD of one residual per shape beside LAPACK's full SVD."""
    shapes: dict[tuple[int, int], Linear] = {}
    for linear in LINEARS:
        shapes.setdefault(linear.shape, linear)
    rows, ratios, shares, saved = [], [], [], 0.0
    for shape, linear in shapes.items():
        residual = _residual(source, linear, layers // 2)
        # LAPACK by itself, without refold's own bookkeeping around it.
        timings = interleave(
            {
                "exact": lambda residual=residual: torch.linalg.svd(residual, full_matrices=False),
                "auto": lambda residual=residual: truncated_svd(residual, RANK),
            },
            rounds,
            warmups=0,
        )
        exact, auto = truncated_svd(residual, RANK, "exact"), truncated_svd(residual, RANK)
        share = auto.kept / exact.kept
        ratio = timings.ratio("exact", over="auto")
        ratios.append(ratio.median)
        shares.append(share)
        number = sum(other.shape == shape for other in LINEARS) * layers // 2
        saved += number * (timings.spread("exact").median - timings.spread("auto").median)
        rows.append(
            [
                f"{linear.name} [{shape[0]}, {shape[1]}]",
                _seconds(timings, "exact"),
                _seconds(timings, "auto"),
                f"{ratio.median:.1f} ({ratio.low:.1f} to {ratio.high:.1f})",
                f"{exact.kept:.2%}",
                f"{auto.kept:.2%}",
                f"{share:.2%}",
            ]
        )
    whole = ""
    if relaxed is not None:
        whole = (
            f"\n\nThe whole relaxed conversion took {relaxed.seconds:.1f} s with `svd: auto`, imports included. With "
            f"`svd: exact` it would take about {relaxed.seconds + saved:.0f} s, reckoned from the medians above: "
            f"{1 + saved / relaxed.seconds:.1f} times as long."
        )
    header = ["residual", "LAPACK, s", "refold, s", "times faster", "energy: LAPACK", "refold", "share of LAPACK's"]
    page.section(
        "Truncated SVD beside LAPACK",
        f"Rank {RANK} of the residual of layers 0 and {layers // 2}, "
        f"`torch.linalg.svd` against `truncated_svd` (auto), {max(rounds, ROUNDS)} rounds, interleaved.\n\n"
        + table(header, rows)
        + whole,
    )
    page.target(
        f"truncated SVD at least {SPEEDUP:.0f} times faster than torch.linalg.svd, for every shape",
        f"{min(ratios):.1f} to {max(ratios):.1f} times",
        min(ratios) >= SPEEDUP,
    )
    page.target(f"at {KEPT:.0%} or more of its kept energy", f"{min(shares):.2%} at least", min(shares) >= KEPT)


def _checkpoint(work: Path, num_layers: int, seed: int) -> Path:
    folder = work / f"tinyllama-{num_layers}-seed{seed}"
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        begun = time.perf_counter()
        make_checkpoint(folder, num_layers, seed)
        print(f"made {folder.name} in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return folder


def _residual(source: Path, linear: Linear, tied_with: int) -> torch.Tensor:
    with CheckpointReader(source) as reader:
        first, second = (
            reader.read(f"model.layers.{layer}.{linear.name}.weight", torch.float32) for layer in (0, tied_with)
        )
    return (first - second) / 2


def _copy(source: Path, destination: Path) -> None:
    destination.mkdir()
    for path in source.iterdir():
        target = destination / path.name
        shutil.copyfile(path, target)
        flush(target)
    flush(destination)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _kept_table(kept: dict[str, float]) -> str:
    rows = []
    for linear in LINEARS:
        short = linear.name.partition(".")[2]
        values = [share for name, share in kept.items() if name.endswith(f".{short}")]
        spectrum = linear.law.spectrum(min(linear.shape)).square()
        ideal = float(spectrum[:RANK].sum() / spectrum.sum())
        rows.append([short, f"{sum(values) / len(values):.2%}", f"{ideal:.2%}"])
    return (
        f"Share of the residuals' energy that rank {RANK} holds, as the plan reports it, beside the first "
        f"{RANK} values of the spectrum the residuals were made with (bf16 weights add a little noise):\n\n"
        + table(["linear", "kept (mean of all depths)", "made with"], rows)
    )


def _mib(count: int) -> str:
    return f"{count / MIB:,.0f}"


def _seconds(timings: Timings, name: str) -> str:
    spread = timings.spread(name)
    return f"{spread.median:.3g} ({spread.low:.3g} to {spread.high:.3g})"


def _ratio(timings: Timings, name: str, over: str) -> str:
    ratio = timings.ratio(name, over)
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
