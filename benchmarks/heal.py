"""The distillation loss compared with full logits, and steps of the loop compared with transformers' Trainer.

    python benchmarks/heal.py --write docs/results/heal.md

Contenders have the same tensors, in one process, and their runs are interleaved. Memory is measured in separate
processes.
"""

import argparse
import os
import statistics
import sys
from functools import partial
from pathlib import Path

# Before torch is imported: waiting threads that spin make busy processes on few cores many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import heal_loop
import numpy as np
import torch
from distil_loss import CONTENDERS, NAIVE, OURS, TOKENS, TRL_VERSION, VOCAB_SIZE, WIDTH, Batch
from memory import run_python
from page import Page, table
from timing import ROUNDS, Spread, interleave
from transformers import PreTrainedModel

ALLOWED_MEMORY, ALLOWED_TIME = 0.15, 1.1
ALLOWED_DIFFERENCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Largest relative difference of loss and gradients; gradients by the 2-norm."""
PARTS = ("memory", "time", "loop")
SHIPPED = Path(__file__).parent.parent / "refold" / "shipped" / "stdlib-5m"
FULL_SPEED, PACKED_SPEED = 1.0, 1.3
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="positions of the batch")
    parser.add_argument("--source", type=Path, default=SHIPPED, help="model of the training steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of each timing, five or more")
    parser.add_argument("--write", type=Path, help="results page to write")
    options = parser.parse_args()
    page = Page("Healing, measured", options.seed)
    peer = (
        f"TRL {TRL_VERSION} is measured beside them" if TRL_VERSION else "TRL, which is a peer, is not installed here"
    )
    page.section("Contenders", f"{NAIVE}: both models' logits, PyTorch's losses and autograd. {OURS}: blocks. {peer}.")
    if "memory" in options.parts:
        compare_memory(page, options)
    if "time" in options.parts:
        compare_time(page, options)
    if "loop" in options.parts:
        compare_loops(page, options)
    return min(1, page.finish(options.write))


def compare_memory(page: Page, options: argparse.Namespace) -> None:
    """Measures the peak anonymous memory of a forward and backward pass, without weights and inputs."""
    rows = []
    script = str(Path(__file__).with_name("distil_loss.py"))
    for precision in options.precisions:
        peaks = {}
        for name in CONTENDERS:
            run = run_python([script, name, precision, str(options.tokens), str(options.seed)])
            peaks[name] = run.peak - int(run.output)
        share = peaks[OURS] / peaks[NAIVE]
        rows.append([precision, *(f"{peaks[name] / MIB:,.0f}" for name in CONTENDERS), f"{share:.3f}"])
        page.target(
            f"distillation loss, {precision}: at most {ALLOWED_MEMORY:.0%} of the memory of full logits",
            f"{share:.1%}",
            share <= ALLOWED_MEMORY,
        )
    page.section(
        f"Memory of the distillation loss, {_shape(options)}",
        "Forward KL and cross-entropy, forward and backward, MiB above weights and inputs; the head's gradient, "
        f"{4 * VOCAB_SIZE * WIDTH // MIB} MiB, is among it.\n\n"
        + table(["products in", *(f"{name}, MiB" for name in CONTENDERS), "ratio"], rows),
    )


def compare_time(page: Page, options: argparse.Namespace) -> None:
    """Measures the wall time of the same pass, and the differences of loss and gradients."""
    rows = []
    for precision in options.precisions:
        batch = Batch.make(precision, options.tokens, options.seed)
        difference = largest_difference(batch)
        timings = interleave(
            {name: partial(run, batch) for name, run in CONTENDERS.items()},
            options.rounds,
            warmups=0,  # the comparison was one
            prepare=batch.forget,
        )
        ratio = timings.ratio(OURS, over=NAIVE)
        rows.append(
            [
                precision,
                *(f"{timings.spread(name).median:.2f}" for name in CONTENDERS),
                f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
                f"{timings.best_ratio(OURS, over=NAIVE):.3f}",
                str(timings.rounds),
                f"{difference:.1e}",
            ]
        )
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
        page.target(
            f"distillation loss, {precision}: at most {ALLOWED_TIME} times the time of full logits",
            f"{ratio.median:.3f}",
            ratio.median <= ALLOWED_TIME,
        )
        page.target(
            f"distillation loss, {precision}: loss and gradients within {ALLOWED_DIFFERENCE[precision]:g}",
            f"{difference:.1e}",
            difference <= ALLOWED_DIFFERENCE[precision],
        )
    header = [
        "products in",
        *(f"{name}, s" for name in CONTENDERS),
        "ratio",
        "ratio of fastest",
        "rounds",
        "difference",
    ]
    page.section(f"Time of the distillation loss, {_shape(options)}", table(header, rows))


def compare_loops(page: Page, options: argparse.Namespace) -> None:
    """Measures training tokens/s of the identity fold in refold's loop, divided by those of the source in Trainer."""
    rows = []
    rng = np.random.default_rng(options.seed)
    count = heal_loop.SEQUENCES * (heal_loop.STEPS + 1)
    full = np.full(count * options.rounds, heal_loop.CONTEXT)
    mixed = rng.integers(16, heal_loop.CONTEXT, size=count * options.rounds, endpoint=True)
    for precision in options.precisions:
        with heal_loop.identity_pair(options.source) as (fold, source):
            vocab_size = source.config.vocab_size
            for name, lengths, wanted in (("full", full, FULL_SPEED), ("mixed", mixed, PACKED_SPEED)):
                speeds = _loop_speeds(fold, source, heal_loop.documents(vocab_size, lengths, 0), precision, options)
                ratios = Spread.of([ours / theirs for ours, theirs in zip(*speeds, strict=True)])
                medians = [statistics.median(each) for each in speeds]
                rows.append(
                    [
                        precision,
                        "all of one length" if name == "full" else "of mixed length",
                        *(f"{speed:,.0f}" for speed in medians),
                        f"{ratios.median:.2f} ({ratios.low:.2f} to {ratios.high:.2f})",
                    ]
                )
                page.target(
                    f"training, {precision}, documents {rows[-1][1]}: at least {wanted} times Trainer's tokens/s",
                    f"{ratios.median:.2f}",
                    ratios.median >= wanted,
                )
            texts = heal_loop.documents(vocab_size, full, 0)
            loop = heal_loop.make_loop(fold, texts, precision, teacher=source)
            loop.model.train()
            heal_loop.run_loop(loop, 1)
            shares = heal_loop.where_time_goes(loop, heal_loop.STEPS)
        page.section(
            f"Where a distillation step's time goes, {precision}",
            table(["part", "share"], [[name, f"{share:.0%}"] for name, share in shares.items()]),
        )
    page.section(
        f"Training: {heal_loop.SEQUENCES} sequences of {heal_loop.CONTEXT} tokens a step, {options.source.name}",
        "Real tokens a second, padding not counted; refold packs documents, Trainer pads each batch to its longest.\n\n"
        + table(["products in", "documents", "refold", "Trainer", "ratio"], rows),
    )


def _loop_speeds(
    fold: PreTrainedModel,
    source: PreTrainedModel,
    texts: list[np.ndarray],
    precision: str,
    options: argparse.Namespace,
) -> tuple[list[float], list[float]]:
    """Tokens/s round by round: the fold in refold's loop, the source in Trainer."""
    loop = heal_loop.make_loop(fold, texts, precision)
    loop.model.train()
    heal_loop.run_loop(loop, 1)
    ours, theirs = [], []
    packed_tokens = heal_loop.STEPS * heal_loop.SEQUENCES * heal_loop.CONTEXT
    per_round = len(texts) // options.rounds
    for number in range(options.rounds):
        chosen = texts[number * per_round : (number + 1) * per_round]
        counted = sum(map(len, chosen)) * heal_loop.STEPS / (heal_loop.STEPS + 1)  # the first step is a warm-up
        theirs.append(counted / heal_loop.run_trainer(source, chosen, precision, heal_loop.STEPS))
        ours.append(packed_tokens / heal_loop.run_loop(loop, heal_loop.STEPS))
    return ours, theirs


def largest_difference(batch: Batch) -> float:
    """Returns the largest relative difference of loss and gradients between refold and full logits."""
    found = {}
    for name, run in CONTENDERS.items():
        batch.forget()
        loss = run(batch)
        found[name] = loss, batch.hidden.grad, batch.weight.grad
    batch.forget()
    differences = []
    for ours, naive in zip(found[OURS], found[NAIVE], strict=True):
        assert ours is not None
        assert naive is not None
        differences.append(float(torch.linalg.vector_norm(ours - naive) / torch.linalg.vector_norm(naive)))
    return max(differences)


def _shape(options: argparse.Namespace) -> str:
    return f"vocabulary {VOCAB_SIZE:,}, width {WIDTH:,}, {options.tokens:,} tokens"


if __name__ == "__main__":
    sys.exit(main())
