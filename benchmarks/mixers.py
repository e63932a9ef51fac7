"""Mixers of linear cost: time and memory beside softmax attention, the token loop, and transformers' mixers.

    python benchmarks/mixers.py --write docs/results/mixers-speed.md

All contenders run in one process, interleaved, on one row of random numbers in float32; `--quick` takes rows a quarter
as long. Memory is measured last. `--device cuda` compares refold's own forms with flash-linear-attention's kernels
instead, in bfloat16; no GPU has run that yet.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

# Before torch is imported: waiting threads that spin make busy processes on few cores many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from mixer_caches import cache_bytes, fill, prefill, step_back
from mixer_clock import Clock
from mixer_kernels import compare_kernels, why_not
from mixer_peers import MAMBA, PEERS
from mixer_work import ATTENTION, BARE, HEAD_SIZE, HEADS, WHOLE, WIDTH, LoneMixer, Work
from page import Page, table
from peak import peak_bytes
from timing import ROUNDS, Spread
from transformers.utils import logging

LENGTHS, CONTEXTS = (1024, 4096, 16384), (1024, 16384, 65536)
QUICK = 4
PASSES: Mapping[str, Callable[[Work], None]] = {"forward": Work.forward, "forward + backward": Work.train}
ALLOWED_GROWTH, ALLOWED_MEMORY, ALLOWED_RATIO, ALLOWED_DECODE = 1.5, 1.05, 1.03, 1.1
NAIVE_SPEEDUP = 10
MUST_BEAT_ATTENTION = ("retention", "mamba2", "gated_deltanet", "SSD", "gated delta rule")
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="rows and contexts a quarter as long")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: beside flash-linear-attention")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of each timing, five or more")
    parser.add_argument("--write", type=Path, help="results page to write")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(options.seed)
    shorter = QUICK if options.quick else 1
    options.lengths, options.contexts = ([n // shorter for n in numbers] for numbers in (LENGTHS, CONTEXTS))
    if options.device != "cpu":
        return _on_device(options)
    page = Page("Mixers, time and memory", options.seed)
    page.section(
        "Sizes",
        f"One row, float32, width {WIDTH}, {HEADS} heads with keys and values of {HEAD_SIZE}; Mamba has its default "
        "inner width of twice that and states of 16. Whole mixers are refold's modules from norm to output projection, "
        "with default options; recurrences are bare, with random queries, keys, values and decays. Attention is "
        "PyTorch's `scaled_dot_product_attention`, causal, whole with the same projections.",
    )
    for name in PARTS:
        if name in options.parts:
            begun = time.perf_counter()
            PARTS[name](page, options)
            if options.write:
                options.write.write_text(page.text())  # what is done stands if the run is cut off
            print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    return min(1, page.finish(options.write))


def _on_device(options: argparse.Namespace) -> int:
    if missing := why_not(options.device):
        print(f"mixers: {missing}", file=sys.stderr)
        return 2
    page = Page(f"Mixers on {torch.cuda.get_device_name()}", options.seed)
    compare_kernels(page, options, PASSES)
    return min(1, page.finish(options.write))


def compare_whole(page: Page, options: argparse.Namespace) -> None:
    """Whole mixers beside attention."""
    mixers = {name: LoneMixer.named(name) for name in WHOLE}
    _compare(page, "Whole mixers", {name: mixer.work for name, mixer in mixers.items()}, options)


def compare_bare(page: Page, options: argparse.Namespace) -> None:
    """Recurrences beside attention."""
    _compare(page, "Bare recurrences", {name: recurrence.work for name, recurrence in BARE.items()}, options)


def _compare(page: Page, title: str, makers: Mapping[str, Callable[[int], Work]], options: argparse.Namespace) -> None:
    """Times each contender at all lengths, once in each round; attention at the greatest length only once."""
    lengths = options.lengths
    works = {(name, tokens): make(tokens) for name, make in makers.items() for tokens in lengths}
    for kind, run in PASSES.items():
        runs = {key: partial(run, work) for key, work in works.items()}
        slow = ATTENTION, lengths[-1]
        clock = Clock({key: each for key, each in runs.items() if key != slow}, options.rounds, {slow: runs[slow]})
        rows, growth = [], {}
        for name in makers:
            row = [name, *(clock.ms((name, tokens)) for tokens in lengths)]
            if name == ATTENTION:
                shared = clock.once[slow] / Spread.of(clock.seconds[name, lengths[1]]).median
                rows.append([*row, f"{shared * lengths[1] / lengths[2]:.2f}", *("1" for _ in lengths)])
                continue
            ratio = _scaled(clock.ratio((name, lengths[2]), over=(name, lengths[1])), lengths[1] / lengths[2])
            growth[name] = ratio.median
            beside = {tokens: clock.ratio((name, tokens), over=(ATTENTION, tokens)) for tokens in lengths}
            rows.append([*row, _show(ratio), *(_show(beside[tokens]) for tokens in lengths)])
            if kind == "forward + backward" and name in MUST_BEAT_ATTENTION:
                page.target(
                    f"{title.lower()}, {name}, {kind}: faster than attention at {_join(lengths[1:])} tokens",
                    _join(f"{beside[tokens].median:.2f}" for tokens in lengths[1:]) + " of its time",
                    all(beside[tokens].median < 1 for tokens in lengths[1:]),
                )
        worst = max(growth, key=lambda name: growth[name])
        page.target(
            f"{title.lower()}, {kind}: time per token at {lengths[2]:,} tokens at most {ALLOWED_GROWTH} times that at "
            f"{lengths[1]:,}",
            f"{growth[worst]:.2f} ({worst})",
            growth[worst] <= ALLOWED_GROWTH,
        )
        header = [
            "",
            *(f"{tokens:,} tokens, ms" for tokens in lengths),
            f"per token, {lengths[2]:,} over {lengths[1]:,}",
            *(f"over attention, {tokens:,}" for tokens in lengths),
        ]
        page.section(f"{title}, {kind}", f"Attention at {lengths[2]:,} tokens is run once.\n\n" + table(header, rows))


def compare_naive(page: Page, options: argparse.Namespace) -> None:
    """Recurrences in chunks beside their loops over tokens."""
    tokens = options.lengths[0]
    names = [name for name, recurrence in BARE.items() if recurrence.naive]
    rows = {name: [name] for name in names}
    for kind, run in PASSES.items():
        works = {}
        for name in names:
            works[name, tokens] = BARE[name].work(tokens)
            works[f"{name}, naive", tokens] = BARE[name].work(tokens, is_naive=True)
        clock = Clock({key: partial(run, work) for key, work in works.items()}, options.rounds)
        faster = {name: clock.ratio((f"{name}, naive", tokens), over=(name, tokens)) for name in names}
        for name in names:
            rows[name] += [clock.ms((f"{name}, naive", tokens)), clock.ms((name, tokens)), _show(faster[name], 1)]
        slow = [f"{name} {faster[name].median:.1f}" for name in names if faster[name].median < NAIVE_SPEEDUP]
        least = min(names, key=lambda name: faster[name].median)
        page.target(
            f"{kind}, {tokens:,} tokens: chunks at least {NAIVE_SPEEDUP} times faster than the loop over tokens",
            ", ".join(slow) or f"{faster[least].median:.1f} ({least})",
            not slow,
        )
    columns = [f"{kind}: {what}" for kind in PASSES for what in ("loop, ms", "chunks, ms", "times faster")]
    page.section(f"Chunks beside the loop over tokens, {tokens:,} tokens", table(["", *columns], list(rows.values())))


@torch.no_grad()
def compare_decoding(page: Page, options: argparse.Namespace) -> None:
    """One step after short and long contexts, which recurrent mixers have read in pieces."""
    contexts = options.contexts
    runs, held = {}, {}
    for name in WHOLE:
        lone = LoneMixer.named(name)
        for context, cache in (fill(contexts) if name == ATTENTION else prefill(lone, contexts)).items():
            held[name, context] = cache_bytes(cache)
            step = lone.bind(torch.randn(1, 1, WIDTH), cache, context)
            runs[name, context] = partial(step_back, step, cache) if name == ATTENTION else step
    clock = Clock(runs, 2 * options.rounds)
    rows, growth = [], {}
    for name in WHOLE:
        growth[name] = clock.ratio((name, contexts[-1]), over=(name, contexts[0]))
        sizes = [f"{held[name, context] / 1024:,.0f}" for context in contexts]
        rows.append([name, *(clock.ms((name, context)) for context in contexts), _show(growth[name]), *sizes])
    recurrent = [name for name in WHOLE if name != ATTENTION]
    worst = max(recurrent, key=lambda name: growth[name].median)
    page.target(
        f"decoding: a step after {contexts[-1]:,} tokens at most {ALLOWED_DECODE} times one after {contexts[0]:,}, "
        "beyond noise",
        f"{_show(growth[worst])} {worst}",
        growth[worst].median <= ALLOWED_DECODE or growth[worst].low <= 1,
    )
    grown = [name for name in recurrent if len({held[name, context] for context in contexts}) > 1]
    page.target("decoding: what is kept does not grow with the context", ", ".join(grown) or "none grows", not grown)
    header = ["", *(f"after {context:,}, ms" for context in contexts), f"{contexts[-1]:,} over {contexts[0]:,}"]
    page.section(
        "One decoding step",
        "States come from reading the whole context, in pieces. Attention's keys and values are random, in "
        "transformers' growing cache, which is cut back after each step.\n\n"
        + table([*header, *(f"kept after {context:,}, KiB" for context in contexts)], rows),
    )


def compare_peers(page: Page, options: argparse.Namespace) -> None:
    """Transformers' mixers and refold's of the same weights."""
    lengths = options.lengths[:2]
    rows = []
    for name, make in PEERS.items():
        pair = make()
        difference = pair.difference(lengths[0])
        slower, ratios = [], []
        for kind, run in PASSES.items():
            # Autograd of Mamba's loop fills a tensor of the whole row's states for each of its tokens.
            is_looped = name == MAMBA and kind == "forward + backward"
            for tokens in [lengths[0] // 4] if is_looped else lengths:
                ours, theirs = (partial(run, work) for work in pair.works(tokens))
                clock = Clock({("refold", tokens): ours, ("peer", tokens): theirs}, options.rounds)
                ratio = clock.ratio(("refold", tokens), over=("peer", tokens))
                if ratio.median > ALLOWED_RATIO and ratio.low > 1:
                    slower.append(f"{kind} at {tokens:,}: {ratio.median:.2f}")
                ratios.append(ratio.median)
                times = (clock.ms((who, tokens)) for who in ("peer", "refold"))
                rows.append([f"{name}, {kind}", f"{tokens:,}", *times, _show(ratio), f"{difference:.0e}"])
                print("  ".join(rows[-1]), file=sys.stderr, flush=True)
        page.target(
            f"refold not slower than transformers' {name}",
            "; ".join(slower) or f"{min(ratios):.2f} to {max(ratios):.2f} of its time",
            not slower,
        )
    page.section(
        "Beside transformers' mixers",
        "Whole modules with the same weights, in eager mode, as transformers runs them on a CPU; the norm of the input "
        "is in refold's time only. The difference of outputs is a share of the largest.\n\n"
        + table(["", "tokens", "transformers, ms", "refold, ms", "ratio", "difference"], rows),
    )


def compare_memory(page: Page, options: argparse.Namespace) -> None:
    """Peak memory of forward and backward of whole mixers at two lengths."""
    short, long = options.lengths[1:]
    rows, growth = [], {}
    for name in WHOLE:
        lone = LoneMixer.named(name)
        lone.work(short).train()  # what libraries keep for themselves is there before
        peaks = []
        for tokens in (short, long):
            peaks.append(peak_bytes(lone.work(tokens).train))
        growth[name] = peaks[1] / peaks[0]
        rows.append([name, *(f"{peak / MIB:,.0f}" for peak in peaks), f"{growth[name]:.2f}"])
    worst = max((name for name in WHOLE if name != ATTENTION), key=lambda name: growth[name])
    allowed = long / short * ALLOWED_MEMORY
    page.target(
        f"memory linear: peak at {long:,} tokens at most {allowed:.1f} times that at {short:,}",
        f"{growth[worst]:.2f} ({worst})",
        growth[worst] <= allowed,
    )
    page.section(
        "Peak memory of forward + backward, whole mixers",
        "Above weights and input, with all gradients.\n\n"
        + table(["", f"{short:,} tokens, MiB", f"{long:,} tokens, MiB", "ratio"], rows),
    )


PARTS: Mapping[str, Callable[[Page, argparse.Namespace], None]] = {
    "whole": compare_whole,
    "bare": compare_bare,
    "naive": compare_naive,
    "decoding": compare_decoding,
    "peers": compare_peers,
    "memory": compare_memory,
}


def _show(ratio: Spread, digits: int = 2) -> str:
    return f"{ratio.median:.{digits}f} ({ratio.low:.{digits}f} to {ratio.high:.{digits}f})"


def _scaled(ratio: Spread, by: float) -> Spread:
    return Spread(ratio.median * by, ratio.low * by, ratio.high * by)


def _join(values: Iterable[object]) -> str:
    return " and ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)


if __name__ == "__main__":
    sys.exit(main())
