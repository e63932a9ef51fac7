"""What healing brings: the paper's relaxed model, refold's better start and depth pruning, at one stored size.

    python benchmarks/healing.py --source MODEL --train TRAIN.parquet --held-out VALIDATION.parquet --work runs/healing

For each arm the learning rate is chosen by short runs, then each seed is trained with it. Every run is one folder
under `--work`, and one that is there is not run again, so the script goes on where it was interrupted. `--write` makes
the page.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from refold.blueprint.heal_stage import HealStage
from refold.blueprint.load import load_recipe
from refold.blueprint.numbers import read_amount
from refold.conversion.convert import carry_out
from refold.conversion.plan import Plan, plan_model
from refold.evaluation.evaluate import evaluate
from refold.evaluation.result import Evaluation, read_evaluation
from refold.healing.heal import heal
from refold.healing.run import HealOptions
from refold.measuring.source_model import read_source_model
from refold.studies.baselines import pruned_recipe

FOLD: dict[str, Any] = {"fold": {"loops": 2}}
ARMS: dict[str, dict[str, Any]] = {
    "relaxed, the paper's start": {
        **FOLD,
        "relax": {"rank": {"parameters": 0.18}, "init": "svd"},
    },
    "relaxed, joint start, own norms, ends untied": {
        "fold": {"loops": 2, "prelude": 1, "coda": 1},
        "relax": {"rank": {"parameters": 0.10}, "init": "joint", "vectors": "own"},
    },
}
PRUNED = "pruned to the same size"


def main() -> None:
    given = arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    model = read_source_model(given.source)
    plans = {name: plan_model(model, load_recipe(recipe)) for name, recipe in ARMS.items()}
    plans[PRUNED] = plan_model(model, pruned_recipe(plans["relaxed, joint start, own norms, ends untied"]))
    results: dict[str, Any] = {}
    for name, plan in plans.items():
        arm = given.work / name.replace(",", "").replace("'", "").replace(" ", "-")
        converted = arm / "converted"
        if not converted.exists():
            carry_out(plan, model.source, converted)
        unhealed = measure(converted, arm / "unhealed.json", given)
        sweep = {rate: train(converted, arm, rate, given.seeds[0], given.sweep_tokens, given) for rate in given.rates}
        best = min(sweep, key=lambda rate: sweep[rate].bits_per_byte)
        runs = {seed: train(converted, arm, best, seed, given.tokens, given) for seed in given.seeds}
        results[name] = summarise(plan, unhealed, sweep, best, runs)
        print(json.dumps({name: results[name]}), flush=True)
    if given.trained_source:
        arm = given.work / "source"
        runs = {seed: train(Path(given.source), arm, given.rates[0], seed, given.tokens, given) for seed in given.seeds}
        results["the source, trained on the same tokens"] = {
            "healed": {seed: difference(found) for seed, found in runs.items()},
            "learning_rate": given.rates[0],
        }
    page = {"results": results, "facts": facts(given)}
    (given.work / "results.json").write_text(json.dumps(page, indent=1) + "\n")
    if given.write is not None:
        given.write.write_text(render(results, given))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/healing"))
    parser.add_argument("--tokens", type=read_amount, default=2_000_000)
    parser.add_argument("--sweep-tokens", type=read_amount, default=200_000)
    parser.add_argument("--eval-tokens", type=read_amount, default=60_000)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch-tokens", type=read_amount, default=8192)
    parser.add_argument("--trained-source", action="store_true", help="also train the source on the same tokens")
    parser.add_argument("--write", type=Path, help="page to write")
    return parser.parse_args()


def measure(model: Path, path: Path, given: argparse.Namespace) -> Evaluation:
    """Evaluates against the source, once."""
    if not path.exists():
        evaluate(
            model, given.held_out, against=given.source, context=given.context, max_tokens=given.eval_tokens
        ).write(path)
    return read_evaluation(path)


def train(start: Path, arm: Path, rate: float, seed: int, tokens: int, given: argparse.Namespace) -> Evaluation:
    """Heals and evaluates one run, once."""
    name = f"lr{rate:g}-seed{seed}-{tokens}"
    stage = HealStage(
        tokens=tokens, learning_rate=rate, batch_tokens=given.batch_tokens, context=given.context, seed=seed
    )
    path = arm / f"{name}.json"
    if not path.exists():
        started = time.perf_counter()
        if not (arm / name).exists():
            heal(start, arm / name, given.train, stage, options=HealOptions(quiet=True))
        found = measure(arm / name, path, given)
        took = time.perf_counter() - started
        print(f"{arm.name} {name}: {difference(found):+.4f} bits per byte, {took:.0f} s", flush=True)
    return measure(arm / name, path, given)


def difference(found: Evaluation) -> float:
    assert found.against is not None
    return found.against.difference


def summarise(
    plan: Plan, unhealed: Evaluation, sweep: dict[float, Evaluation], best: float, runs: dict[int, Evaluation]
) -> dict[str, Any]:
    source, target = plan.cost.source, plan.cost.target
    assert unhealed.against is not None
    errors = [found.against.difference_error for found in runs.values() if found.against is not None]
    return {
        "stored": target.non_embedding_parameters / source.non_embedding_parameters,
        "lora": sum(plan_lora(plan)) / source.non_embedding_parameters,
        "compute": target.flops(256) / source.flops(256),
        "cache": target.cache_bytes(256) / source.cache_bytes(256),
        "unhealed": difference(unhealed),
        "sweep": {rate: difference(found) for rate, found in sweep.items()},
        "learning_rate": best,
        "healed": {seed: difference(found) for seed, found in runs.items()},
        "error": max((error or 0.0) for error in errors),
        "agreement": {seed: found.against.agreement for seed, found in runs.items() if found.against is not None},
    }


def plan_lora(plan: Plan) -> list[int]:
    """Numbers in each LoRA tensor."""
    from refold.blueprint.tensors import target_tensors

    return [each.num_elements for each in target_tensors(plan.blueprint) if each.role in ("lora_a", "lora_b")]


def facts(given: argparse.Namespace) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "source": Path(given.source).name,
        "tokens": given.tokens,
        "sweep_tokens": given.sweep_tokens,
        "seeds": given.seeds,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "commit": commit.stdout.strip(),
        "python": sys.version.split()[0],
    }


def render(results: dict[str, Any], given: argparse.Namespace) -> str:
    """The page."""
    told = facts(given)
    lines = [
        "# Healing at one stored size",
        "",
        f"Bits per byte above the source (`{told['source']}`) on held-out text, before and after healing for "
        f"{given.tokens:,} tokens; seeds {', '.join(map(str, given.seeds))}.",
        "Stored: share of the source's non-embedding parameters; LoRA: the part of it in LoRAs.",
        "",
        "| model | stored | LoRA | compute | cache | unhealed | healed, by seed | mean | learning rate | agreement |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        healed = list(row["healed"].values())
        each = " / ".join(f"{value:+.4f}" for value in healed)
        mean = f"{statistics.mean(healed):+.4f}"
        if "stored" not in row:
            lines.append(
                f"| {name} | 100% | 0% | 1.00x | 1.00x | +0.0000 | {each} | {mean} | {row['learning_rate']:g} | |"
            )
            continue
        agreement = statistics.mean(row["agreement"].values())
        lines.append(
            f"| {name} | {row['stored']:.1%} | {row['lora']:.1%} | {row['compute']:.2f}x | {row['cache']:.2f}x "
            f"| {row['unhealed']:+.4f} | {each} | **{mean}** | {row['learning_rate']:g} | {agreement:.1%} |"
        )
    lines += ["", f"Learning rates were chosen for each arm by runs of {given.sweep_tokens:,} tokens:", ""]
    for name, row in results.items():
        if "sweep" in row:
            tried = ", ".join(f"{float(rate):g}: {value:+.4f}" for rate, value in row["sweep"].items())
            lines.append(f"- {name}: {tried}")
    error = max(row.get("error", 0.0) for row in results.values())
    command = " ".join(argument if "/" not in argument else Path(argument).name for argument in sys.argv[1:])
    lines += [
        "",
        f"The paired standard error of each difference is at most {error:.4f} ({given.eval_tokens:,} held-out tokens, "
        f"windows of {given.context}, stride {given.context // 2}). Objective: 0.5 cross-entropy + 0.5 KL to the "
        f"source; {given.batch_tokens:,} tokens a step, context {given.context}.",
        "",
        f"Machine: {told['machine']}; Python {told['python']}; commit {told['commit']}. Command:",
        "",
        f"    python benchmarks/healing.py {command}",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
