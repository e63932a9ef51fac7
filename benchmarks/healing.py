"""Quality of healed recursive models, strict and relaxed, compared with depth pruning and training from scratch.

    python benchmarks/healing.py --source MODEL --train TRAIN.parquet --held-out VALIDATION.parquet --work runs/healing
    python benchmarks/healing.py ... --only strict 'pruned to strict'

Short runs choose the learning rate of each arm, and then each seed is trained with it. Every run is one folder under
`--work`. An existing run is not repeated, so an interrupted script continues. `--write` writes the page.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from arms import Arm, Chosen, arm_folder, command_lines, machine, make_parser, measure

from refold.blueprint.owned.lora import LORA
from refold.blueprint.tensors import target_tensors
from refold.checkpoint.locate import PLAN_NAME
from refold.conversion.convert import carry_out
from refold.conversion.measured import reads_text
from refold.data.readers import open_data
from refold.evaluation.result import Evaluation
from refold.planning.plan import Draft, StackPlan, plan_model, read_plan
from refold.recipe.heal import HealStage
from refold.recipe.load import RecipeLike, load_recipe
from refold.sources.source_model import SourceModel, read_source_model
from refold.studies.baselines import pruned_recipe, scratch_plan

FOLD: dict[str, Any] = {"fold": {"loops": 2}}


def relaxed(share: float, lora: str = "svd", stored: str = "average") -> dict[str, Any]:
    """Two loops of stored layers that start in one way, and LoRAs of a share of the parameters that start in another.

    Average + SVD is the paper's.
    """
    return {"fold": {"loops": 2, "init": stored}, "relax": {"rank": {"parameters": share}, "init": lora}}


ARMS: dict[str, RecipeLike] = {
    "strict": FOLD,
    "relaxed 5%, Average + SVD": relaxed(0.05),
    "relaxed 10%, Average + SVD": relaxed(0.1),
    "relaxed 20%, Average + SVD": relaxed(0.2),
    "relaxed 10%, Average, zero": relaxed(0.1, "zero"),
    "relaxed 10%, Stepwise + SVD": relaxed(0.1, "svd", "stepwise"),
    "relaxed 10%, Stepwise, zero": relaxed(0.1, "zero", "stepwise"),
    "relaxed 18%, Average + SVD": relaxed(0.18),
    "relaxed 10%, joint start, own norms, ends untied": {
        "fold": {"loops": 2, "prelude": 1, "coda": 1},
        "relax": {"rank": {"parameters": 0.1}, "init": "joint", "vectors": "own"},
    },
    "low rank, measured ranks": "lowrank",
    "tied where it pays, low rank elsewhere": "compact",
}


def pruned_evenly(model: SourceModel, plan: StackPlan) -> Draft:
    block = {"parameters": plan.cost.target.non_embedding_parameters, "by": "even"}
    return plan_model(model, load_recipe({"drop": {"block": block}}))


TWINS: dict[str, Callable[[SourceModel, StackPlan], Draft]] = {
    "pruned to": lambda model, plan: plan_model(model, pruned_recipe(plan)),
    "pruned evenly to": pruned_evenly,
    "from scratch:": scratch_plan,
}
"""Rivals of any arm, by how their names begin: `pruned to strict` has at most the size of `strict`."""
DEFAULT = ("relaxed 18%, Average + SVD", "relaxed 10%, joint start, own norms, ends untied")


def make_plans(model: SourceModel, only: list[str] | None) -> dict[str, Draft]:
    """Plans the named arms, twins among them."""
    found: dict[str, Draft] = {}
    for name in only or [*DEFAULT, f"pruned to {DEFAULT[-1]}"]:
        twin = next((begin for begin in TWINS if name.startswith(begin)), None)
        recipe = ARMS[name if twin is None else name.removeprefix(twin).strip()]
        plan = plan_model(model, load_recipe(recipe))
        found[name] = plan if twin is None else TWINS[twin](model, plan)
    return found


def main() -> None:
    given = arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    model = read_source_model(given.source)
    plans = make_plans(model, given.only)
    results: dict[str, Any] = {}
    for name, plan in plans.items():
        folder = arm_folder(given.work, name)
        converted = folder / "converted"
        if not converted.exists():
            text = open_data([given.train]) if reads_text(plan) else None
            carry_out(plan, model.source, converted, calibration=text)
        unhealed = measure(converted, folder / "unhealed.json", given)
        made = read_plan(converted / PLAN_NAME)
        results[name] = summarise(made, unhealed, Arm(converted, folder, partial(stages, given), given).choose())
        print(json.dumps({name: results[name]}), flush=True)
    if given.trained_source:
        source, rate = Arm(Path(given.source), given.work / "source", partial(stages, given), given), given.rates[0]
        results["the source, trained on the same tokens"] = {
            "healed": {seed: difference(source.train(rate, seed, given.tokens).found) for seed in given.seeds},
            "learning_rate": rate,
        }
    page = {"results": results, "facts": facts(given)}
    (given.work / "results.json").write_text(json.dumps(page, indent=1) + "\n")
    if given.write is not None:
        given.write.write_text(render(results, given))


def arguments() -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        work=Path("runs/healing"),
        tokens=2_000_000,
        sweep_tokens=200_000,
        eval_tokens=60_000,
        rates=[5e-4, 1e-3, 2e-3],
        batch_tokens=8192,
    )
    every = [*ARMS, *(f"{begin} {name}" for begin in TWINS for name in ARMS)]
    parser.add_argument("--only", nargs="+", choices=every, metavar="ARM", help="these arms: " + "; ".join(every))
    parser.add_argument("--trained-source", action="store_true", help="also train the source on the same tokens")
    return parser.parse_args()


def stages(given: argparse.Namespace, rate: float, seed: int, tokens: int) -> tuple[HealStage]:
    return (
        HealStage(tokens=tokens, learning_rate=rate, batch_tokens=given.batch_tokens, context=given.context, seed=seed),
    )


def difference(found: Evaluation) -> float:
    assert found.against is not None
    return found.against.difference


def summarise(plan: StackPlan, unhealed: Evaluation, chosen: Chosen) -> dict[str, Any]:
    source, target = plan.cost.source, plan.cost.target
    against = {seed: run.found.against for seed, run in chosen.runs.items() if run.found.against is not None}
    return {
        "stored": target.non_embedding_parameters / source.non_embedding_parameters,
        "lora": sum(plan_lora(plan)) / source.non_embedding_parameters,
        "compute": target.flops(256) / source.flops(256),
        "cache": target.cache_bytes(256) / source.cache_bytes(256),
        "unhealed": difference(unhealed),
        "sweep": {rate: difference(found) for rate, found in chosen.sweep.items()},
        "learning_rate": chosen.rate,
        "healed": {seed: difference(run.found) for seed, run in chosen.runs.items()},
        "error": max(each.difference_error or 0.0 for each in against.values()),
        "agreement": {seed: each.agreement for seed, each in against.items()},
    }


def plan_lora(plan: StackPlan) -> list[int]:
    """Numbers in each LoRA tensor."""
    return [each.num_elements for each in target_tensors(plan.blueprint) if each.kind is LORA]


def facts(given: argparse.Namespace) -> dict[str, Any]:
    return {
        "source": Path(given.source).name,
        "tokens": given.tokens,
        "sweep_tokens": given.sweep_tokens,
        "seeds": given.seeds,
        **machine(),
    }


def render(results: dict[str, Any], given: argparse.Namespace) -> str:
    """The page."""
    told = facts(given)
    lines = [
        "# Recursive models, healed",
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
    lines += [
        "",
        f"The paired standard error of each difference is at most {error:.4f} ({given.eval_tokens:,} held-out tokens, "
        f"windows of {given.context}, stride {given.context // 2}). Objective: 0.5 cross-entropy + 0.5 KL to the "
        f"source; {given.batch_tokens:,} tokens a step, context {given.context}.",
        "",
        *command_lines(),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
