"""Peak memory of analysing and planning a checkpoint with the shape of Llama-7B.

    python benchmarks/analyse.py --layers 4 32 --tokens 64

Makes two checkpoints with different numbers of layers, so that growth with the number of layers is visible. Their
weights are random (400 MB per layer, and 0.5 GB). They are in a temporary folder, or in the folder of --work, which
keeps them for the next run. Every part runs in its own process. Moments of gradients take 2 GB of disk per layer.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

# Before torch is imported: waiting threads that spin make busy processes on few cores many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from llama7b_shaped import make_checkpoint
from memory import INTERVAL, ProcessRun, run_python
from page import Page, table
from workplace import workplace

from refold.fields import read_amount

ALLOWED, SAME_WITHIN = 4 * 10**9, 0.05
MIB = 2**20
KEEP = """
import sys
from pathlib import Path
from refold.conversion.measured import keep_moments
from refold.data.readers import from_documents
source, out, tokens, context = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
text = from_documents([f"def number_{index}():\\n    return {index} * {index % 7}\\n" for index in range(3 * tokens)])
recipe = {"factor": {"parameters": 0.5, "weight": "fisher"}, "calibration": {"tokens": tokens, "context": context}}
keep_moments(source, recipe, text, out)
"""
PARTS = {
    "plan": "`refold plan SOURCE` (all built-in recipes)",
    "analyse": "`refold analyse SOURCE --no-spectra`",
    "moments": "`refold analyse SOURCE --no-spectra --moments`",
    "fisher": "moments of inputs and gradients, as `convert` takes them for `weight: fisher`",
    "spectra": "`refold analyse SOURCE`, residual spectra of all tyings too",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for checkpoints, kept there (default: temporary)")
    parser.add_argument("--seed", type=int, default=0, help="of the checkpoints' weights")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32], help="layers of each checkpoint")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=["plan", "analyse"])
    parser.add_argument("--tokens", type=read_amount, default=64)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--write", type=Path, help="results page to write")
    options = parser.parse_args()
    page = Page("Analysing and planning a checkpoint of Llama-7B's shape", options.seed)
    bare, runs = run_python(["-c", "pass"]), {}
    with workplace(options.work) as work:
        for layers in options.layers:
            source = work / f"{layers}-layers"
            if not source.exists():
                make_checkpoint(source, layers, options.seed)
            for part in options.parts:
                runs[part, layers] = run_part(part, source, work / "out", options)
                shutil.rmtree(work / "out", ignore_errors=True)
                print(f"{part}, {layers} layers: {runs[part, layers].peak / MIB:,.0f} MiB", flush=True)
    page.section(
        "Memory",
        f"Hidden size 4,096, MLP 11,008, 32 heads, vocabulary 32,000, bf16, random weights; {options.tokens:,} tokens "
        f"of context {options.context}. Anonymous resident memory (`RssAnon`), read from outside every "
        f"{INTERVAL * 1e3:.0f} ms; mapped source files do not count. A bare interpreter has {bare.peak / MIB:.0f} MiB."
        "\n\n"
        + table(
            ["process", "layers", "peak, MiB", "seconds with imports"],
            [
                [PARTS[part], str(layers), f"{run.peak / MIB:,.0f}", f"{run.seconds:.1f}"]
                for (part, layers), run in runs.items()
            ],
        ),
    )
    for part in options.parts:
        peaks = [runs[part, layers].peak for layers in options.layers]
        page.target(f"{part}: under {ALLOWED / 1e9:.0f} GB", f"{max(peaks) / 1e9:.2f} GB", max(peaks) < ALLOWED)
        if len(peaks) > 1:
            grown = max(peaks) / min(peaks) - 1
            names = " and ".join(str(layers) for layers in options.layers)
            says = f"{part}: the same peak within {SAME_WITHIN:.0%} for {names} layers"
            page.target(says, f"{grown:.1%} apart", grown <= SAME_WITHIN)
    return min(1, page.finish(options.write))


def run_part(part: str, source: Path, out: Path, options: argparse.Namespace) -> ProcessRun:
    """Runs one part in its own process."""
    size = [str(options.tokens), str(options.context)]
    if part == "plan":
        return run_python(["-m", "refold", "plan", str(source)])
    if part == "fisher":
        return run_python(["-c", KEEP, str(source), str(out), *size])
    analyse = ["-m", "refold", "analyse", str(source), "--out", str(out), "--tokens", size[0], "--context", size[1]]
    further = {"analyse": ["--no-spectra"], "moments": ["--no-spectra", "--moments"], "spectra": []}
    return run_python([*analyse, *further[part]])


if __name__ == "__main__":
    sys.exit(main())
