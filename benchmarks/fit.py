"""Fits to budgets beside every single method and the best pairs made by hand, on held-out text of two domains.

    python benchmarks/fit.py measure --name books-10m --source MODEL --data A=0.5 --data B=0.5 --held-out C D --work W
    python benchmarks/fit.py measure ... --limit flops --budgets 80 67 50
    python benchmarks/fit.py write --work runs/fit --write docs/results/fit.md

`measure` keeps every figure under `--work`, so an interrupted run goes on. `write` makes the page of all that is there.
Pairs are single methods whose weights are stored as int4 besides, at the same budget.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from page import Page, run_facts, table

from refold.fitting.budget import Budget
from refold.fitting.fit import sweep
from refold.fitting.job import FitJob
from refold.fitting.look import blueprint_costs
from refold.fitting.menu import Costs
from refold.fitting.options import FitOptions, read_budgets
from refold.fitting.report import FitCandidate, FitReport
from refold.fitting.single_methods import SINGLE_METHODS, SingleFits, SizedMethod, in_integers
from refold.planning.build import identity_blueprint
from refold.progress import Show

PAIRED = ("low rank", "pruning", "width", "recursion")
SKETCH = {30: 0.0041, 25: 0.0211, 20: 0.0750, 17: 0.161}
"""Loss on books of a first sketch on books-10m, in nats per token, by percent of the bytes."""
READING = """Nothing is healed. A loss below zero means that the change helped on this text: books-10m was trained at
256 tokens and on books alone, so windows shorter than the 512 tokens of the evaluation, and a little noise on
documentation, lower its loss. The fit looks for the least divergence from its source, not for such gains; a method that
moves the model far may have the lower loss there. Small bases flatter: no real model has been measured here yet.

![Loss by bytes, and predictions beside measurements](fit.png)"""
UNITS = {"bytes": "bytes", "cache": "cache", "flops": "flops", "latency": "milliseconds"}


def pairs() -> Iterator[SizedMethod]:
    """Yields the pairs made by hand."""
    for method in SINGLE_METHODS:
        if method.name in PAIRED:
            yield in_integers(method, "int4")


def measure_pairs(
    work: Path, arguments: argparse.Namespace, budgets: Sequence[Budget], options: FitOptions
) -> list[dict[str, Any]]:
    """Measures the pairs at every budget on the report's text."""
    job = FitJob.open(arguments.source, work, options, arguments.data, arguments.held_out)
    source = blueprint_costs(identity_blueprint(job.model.arch), budgets[0].context)
    looker, rows = job.looker(budgets[0].context), []
    with job.folder.claim(job.identity(), overwrite=True):
        for budget in budgets:
            limits = {name: each for name, each in budget.limits(source)._asdict().items() if each is not None}
            fits = SingleFits(looker, limits, source, job.shared)
            for method in pairs():
                made = fits.make(method)
                row: dict[str, Any] = {"budget": budget.describe(), "name": method.name, "reason": made.reason}
                if made.looked is not None:
                    row["losses"] = {name: each.loss for name, each in made.looked.losses.items()}
                    row["shares"] = shares(made.looked.costs, source)
                rows.append(row)
                print(json.dumps(row), flush=True)
        job.folder.discard_models()
    return rows


def shares(costs: Costs, source: Costs) -> dict[str, float]:
    """Returns costs as shares of the source's."""
    pairs_of = zip(source._asdict().items(), costs, strict=True)
    return {name: cost / whole for (name, whole), cost in pairs_of if whole}


def measure(arguments: argparse.Namespace) -> None:
    """Measures one source at several budgets of one quantity."""
    work = arguments.work / f"{arguments.name}-{arguments.limit}"
    options = FitOptions(
        calibration_tokens=arguments.calibration_tokens,
        looks=arguments.looks,
        singles=not arguments.no_singles,
        eval_tokens=arguments.eval_tokens,
        device_table=arguments.on,
        without=tuple(arguments.without),
        overwrite=True,
        show=Show(lambda text: print(text, file=sys.stderr, flush=True)),
    )
    amounts = [f"{share:g}%" for share in arguments.budgets]
    budgets = [read_budgets({arguments.limit: amount}, arguments.context)[0] for amount in amounts]
    begun = time.time()
    report = sweep(arguments.source, work, budgets, options, data=arguments.data, held_out=arguments.held_out)
    found = [] if arguments.no_pairs else measure_pairs(work, arguments, budgets, options)
    result = {
        "name": arguments.name,
        "limit": arguments.limit,
        "facts": run_facts(0, os.getloadavg()[0]),
        "seconds": round(time.time() - begun),
        "pairs": found,
        "report": report.model_dump(mode="json"),
    }
    (arguments.work / f"{arguments.name}-{arguments.limit}.json").write_text(json.dumps(result, indent=1))


def loss_cell(losses: dict[str, float], names: Sequence[str]) -> str:
    """Returns losses in the order of the texts."""
    return " / ".join(f"{losses[name]:+.4f}" if abs(losses[name]) < 0.1 else f"{losses[name]:+.2f}" for name in names)


def losses_of(made: FitCandidate) -> dict[str, float]:
    """Returns the measured losses of a candidate by text."""
    return {name: each.loss for name, each in made.losses.items()}


def render(page: Page, result: dict[str, Any]) -> None:
    """Adds the table of one source and one quantity to the page."""
    report = FitReport.model_validate(result["report"])
    quantity = UNITS[result["limit"]]
    names = [each.name for each in report.held_out]
    rows, agreed = [], []
    for point in report.points:
        others: list[tuple[str, dict[str, float], str]] = []
        for single in point.singles:
            if single.made is not None:
                share = single.made.costs.share(quantity, report.source_costs)  # pyright: ignore[reportArgumentType]
                others.append((single.name, losses_of(single.made), f"{share:.1%}"))
        singles = len(others)
        for pair in result["pairs"]:
            if pair["budget"] == point.budget.text and "losses" in pair:
                others.append((pair["name"], pair["losses"], f"{pair['shares'][quantity]:.1%}"))
        own = losses_of(point)
        own_mean = sum(own.values()) / len(own)
        share = point.costs.share(quantity, report.source_costs)  # pyright: ignore[reportArgumentType]
        rows.append([f"**{point.budget.text}**", "**fit**", f"{share:.1%}", loss_cell(own, names), point.summary])
        for kind, group in (("best single", others[:singles]), ("best pair", others[singles:])):
            ranked = sorted(group, key=lambda each: sum(each[1].values()))
            rows.extend(["", f"{kind}: {name}", cost, loss_cell(found, names), ""] for name, found, cost in ranked[:1])
            if ranked:
                best = sum(ranked[0][1].values()) / len(names)
                if kind == "best single":
                    page.target(
                        f"{result['name']}, {point.budget.text}: no worse than the best single method",
                        f"{own_mean:+.4f} against {best:+.4f} ({ranked[0][0]})",
                        own_mean <= best + 0.001,
                    )
        rows.extend(["", name, cost, loss_cell(found, names), ""] for name, found, cost in others)
        if point.predicted is not None and point.measured:
            measured = sum(each.loss for each in point.measured.values()) / len(point.measured)
            agreed.append((point.budget.text, point.predicted, measured, bool(point.agrees)))
        percent = round(share * 100) if quantity == "bytes" else 0
        if result["name"] == "books-10m" and quantity == "bytes" and percent in SKETCH:
            page.target(
                f"books-10m, {percent}% of the bytes: at most {SKETCH[percent]:+.4f} on books (a first experiment)",
                f"{own[names[0]]:+.4f}",
                own[names[0]] <= SKETCH[percent],
            )
    heads = ["budget", "model", quantity, f"loss on {' / '.join(names)}", "choice"]
    source = ", ".join(f"{each.name} {each.loss:.3f}" for each in report.held_out)
    texts = ", ".join(f"{each.name} {each.weight:.0%}" for each in report.text)
    checked = ", ".join(f"{budget}: {one:.4f} and {two:.4f}" for budget, one, two, _ in agreed)
    page.target(
        f"{result['name']}, {result['limit']}: predicted and measured within 30% or 0.01 nats",
        f"{sum(each[3] for each in agreed)} of {len(agreed)}",
        all(each[3] for each in agreed),
    )
    page.section(
        f"{result['name']}: {result['limit']}",
        f"Nats per token over the source ({source}). Measured on {sum(t.tokens for t in report.text):,} tokens: "
        f"{texts}. "
        f"Seconds: {', '.join(f'{name} {each:.0f}' for name, each in report.seconds.items())}. Predicted and measured: "
        f"{checked}.\n\n{table(heads, rows)}",
    )


def write(arguments: argparse.Namespace) -> None:
    """Writes the page of all results."""
    results = [json.loads(path.read_text()) for path in sorted(arguments.work.glob("*-*.json"))]
    page = Page("Fits to a budget", 0, facts=results[0]["facts"])
    page.section("Reading", READING)
    for result in results:
        render(page, result)
    if arguments.write is not None:
        arguments.write.write_text(page.text())
        arguments.write.with_suffix(".json").write_text(json.dumps(results, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure")
    one.add_argument("--name", required=True)
    one.add_argument("--source", required=True)
    one.add_argument("--data", action="append", required=True)
    one.add_argument("--held-out", nargs="+", required=True)
    one.add_argument("--limit", choices=tuple(UNITS), default="bytes")
    one.add_argument("--budgets", type=float, nargs="+", default=[60, 50, 40, 30, 20])
    one.add_argument("--context", type=int, default=8192)
    one.add_argument("--on", type=Path)
    one.add_argument("--without", nargs="*", default=[])
    one.add_argument("--no-pairs", action="store_true")
    one.add_argument("--no-singles", action="store_true")
    one.add_argument("--looks", type=int, default=4)
    one.add_argument("--calibration-tokens", type=int, default=16384)
    one.add_argument("--eval-tokens", type=int, default=16384)
    one.add_argument("--work", type=Path, required=True)
    two = commands.add_parser("write")
    two.add_argument("--work", type=Path, required=True)
    two.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    measure(arguments) if arguments.command == "measure" else write(arguments)


if __name__ == "__main__":
    main()
