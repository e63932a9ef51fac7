"""Time of few-shot tasks by refold's class in lm-eval, beside lm-eval's own `hf` on the same source.

    python benchmarks/tasks.py --source SMOLLM2 --items FOLDER --limit 500 --write docs/results/tasks.md

Both score the same items of the seven tasks, task by task, in turns in one process. `hf` runs at several batch sizes,
and the fastest of them counts for each task. The log-likelihood of every answer is compared. Seconds of the processor
are reported too: with one thread they hardly depend on other processes of a busy machine.
"""

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models import huggingface
from page import Page, table

from refold.scorecard.tasks.choose import choose_tasks
from refold.scorecard.tasks.harness import quiet_harness, require_harness
from refold.scorecard.tasks.items import draw_order
from refold.scorecard.tasks.measure import HEADLINES
from refold.scorecard.tasks.model import RefoldLM

SEED = 0
MOST = 1.2
"""Target: most time, as a factor of that of `hf`."""


def main() -> int:
    """Measures each task by each class and prints the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True)
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["seven"])
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    page = Page("Few-shot tasks", SEED)
    figures = {}
    for dtype in given.dtypes:
        with quiet_harness():
            contenders = make_contenders(given.source, dtype, given.batch_sizes)
            figures[dtype] = measure(contenders, choose_tasks(given.tasks, given.items), given.limit)
        add_section(page, dtype, figures[dtype])
        if given.write is not None:
            given.write.write_text(page.text())
        contenders.clear()
        gc.collect()
    if len(figures) > 1:
        page.section("bfloat16", compare_dtypes(figures[given.dtypes[0]], figures[given.dtypes[1]], given.dtypes))
    page.section("Harness", f"{require_harness()}, {given.limit} items of each task, drawn with seed {SEED}.")
    return page.finish(given.write)


def make_contenders(source: str, dtype: str, batch_sizes: list[int]) -> dict[str, Any]:
    """Returns refold's class and `hf` at some batch sizes, the latter with one model."""
    ours = RefoldLM(source, dtype=dtype, device="cpu", progress=lambda done, total: None)
    HFLM: Any = huggingface.HFLM
    theirs = HFLM(pretrained=source, dtype=dtype, device="cpu", batch_size=batch_sizes[0])
    made: dict[str, Any] = {"refold": ours}
    for size in batch_sizes:
        made[f"hf {size}"] = (
            theirs
            if size == batch_sizes[0]
            else HFLM(pretrained=theirs.model, tokenizer=theirs.tokenizer, batch_size=size)
        )
    return made


def measure(contenders: dict[str, Any], tasks: dict[str, Any], limit: int) -> dict[str, dict[str, Any]]:
    """Returns, by task and contender, seconds, headline metric, log-likelihoods of all answers, processor seconds."""
    found: dict[str, dict[str, Any]] = {}
    for place, (name, task) in enumerate(tasks.items()):
        items = list(task.eval_docs)
        drawn = {name: sorted(draw_order([0] * len(items), SEED, name)[:limit])}
        found[name] = {}
        for contender in list(contenders)[:: 1 if place % 2 == 0 else -1]:
            begun, used = time.perf_counter(), time.process_time()
            result: Any = evaluate(
                contenders[contender], {"tasks": {name: task}, "groups": {}}, samples=drawn, bootstrap_iters=0
            )
            seconds, used = time.perf_counter() - begun, time.process_time() - used
            metrics = {key.partition(",")[0]: value for key, value in result["results"][name].items()}
            headline = next(metric for metric in HEADLINES if metric in metrics)
            answers = [float(answer[0][0]) for sample in result["samples"][name] for answer in sample["resps"]]
            found[name][contender] = (seconds, metrics[headline], answers, used)
            print(
                f"{name} {contender}: {seconds:.1f} s, processor {used:.1f} s, {headline} {metrics[headline]:.4f}",
                flush=True,
            )
    return found


def add_section(page: Page, dtype: str, found: dict[str, dict[str, Any]]) -> None:
    """Adds the table of one dtype with its targets."""
    rows, ours, theirs, differs = [], [0.0, 0.0], [0.0, 0.0], []
    sizes = sorted(int(key.removeprefix("hf ")) for key in next(iter(found.values())) if key != "refold")
    for name, by in found.items():
        one = by["refold"]
        # Processor seconds choose, which are steadier.
        best = min((by[f"hf {size}"] for size in sizes), key=lambda each: each[3])
        for place in (0, 1):
            ours[place] += one[3 * place]
            theirs[place] += best[3 * place]
        differs += [name] if one[1] != best[1] else []
        row = [name, f"{one[0]:.1f} ({one[3]:.1f})"]
        row += [f"{by[f'hf {size}'][0]:.1f} ({by[f'hf {size}'][3]:.1f})" for size in sizes]
        far = max(abs(a - b) for a, b in zip(one[2], best[2], strict=True))
        rows.append(
            [*row, f"{one[0] / best[0]:.2f} ({one[3] / best[3]:.2f})", f"{one[1]:.4f}", f"{best[1]:.4f}", f"{far:.0e}"]
        )
    header = ["task", "refold", *(f"hf, batch {size}" for size in sizes), "refold / fastest hf"]
    header += ["refold's figure", "hf's figure", "largest difference of a log-likelihood, nats"]
    page.section(f"Seconds (of the processor) and figures in {dtype}", table(header, rows))
    for place, kind in enumerate(("time", "processor time")):
        measured = f"{ours[place] / theirs[place]:.2f} ({ours[place]:.0f} s for {theirs[place]:.0f} s)"
        page.target(
            f"{kind} of all tasks in {dtype}: at most {MOST} times the fastest hf",
            measured,
            ours[place] <= MOST * theirs[place],
        )
    if dtype == "float32":
        measured = f"differs for {', '.join(differs)}" if differs else "equal"
        page.target("figures in float32 equal to the last digit", measured, not differs)


def compare_dtypes(first: dict[str, Any], second: dict[str, Any], names: list[str]) -> str:
    """Returns how time and figures of refold change from one dtype to the other."""
    rows = []
    for name in first:
        one, two = first[name]["refold"], second[name]["refold"]
        rows.append([name, f"{one[3]:.1f}", f"{two[3]:.1f}", f"{one[1]:.4f}", f"{two[1]:.4f}"])
    seconds = [sum(found[name]["refold"][3] for name in found) for found in (first, second)]
    header = ["task", *(f"{name}, processor s" for name in names[:2]), *(f"figure in {name}" for name in names[:2])]
    return f"{table(header, rows)}\n\nAll tasks: {seconds[1] / seconds[0]:.2f} times the processor time of {names[0]}."


if __name__ == "__main__":
    raise SystemExit(main())
