"""Benefit of transferring weights to mixers of linear cost: transferred and from scratch, at equal tokens.

    python benchmarks/mixer_study.py --source MODEL --train TEXT --held-out TEXT --work runs/mixers --write PAGE

Short runs of one seed choose the learning rate of each arm, and then every seed is trained with it. A run is one folder
under `--work`. An existing run is not repeated, so an interrupted script continues.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from arms import Arm, arm_folder, command_lines, make_parser, measure

from refold.conversion.convert import carry_out
from refold.planning.plan import StackPlan, plan_model
from refold.recipe.heal import HealStage
from refold.recipe.load import load_recipe
from refold.sources.source_model import SourceModel, read_source_model
from refold.studies.baselines import scratch_plan

ALL, XATL, NONE = "all", ["o_proj", "mlp"], []
MIDDLE_RATE = 3e-4
"""Of a protocol whose other stages say how their rates relate to it."""
KEPT = [1, 3]
"""Layers with attention in the hybrids that are folded as well; two loops after one untied layer tie them."""
Recipe = dict[str, Any]
FOLDED: Recipe = {
    "fold": {"loops": 2, "prelude": 1},
    "relax": {"rank": {"parameters": 0.2}, "init": "joint", "vectors": "own"},
}


def swap(mixer: str, transfer: Any = ALL, **options: Any) -> Recipe:
    return {"mixers": [{"type": mixer, "transfer": transfer, **options}]}


@dataclass(frozen=True)
class Way:
    """Recipe and protocol of one arm.

    Attributes:
        recipe: Recipe of the conversion.
        protocol: Healing protocol; `next_token`, `distil` and `frozen` are a single stage of this kind.
        fresh: Whether all weights are fresh.
    """

    recipe: Recipe
    protocol: str = "next_token"
    fresh: bool = False
    tables: tuple[str, ...] = field(default=("mixers",))


def _ways() -> dict[str, Way]:
    mixers = {
        "retention": swap("retention"),
        "mamba2": swap("mamba2"),
        "gla": swap("gla"),
        "gated deltanet": swap("gated_deltanet"),
        "hedgehog features": swap("linear_attention"),
        "hedgehog, window 32": swap("linear_attention", window=32),
        "striped mamba": swap("mamba", ["mlp"]),
        "gated deltanet, attention at xatl's depths": swap("gated_deltanet", **{"except": "xatl"}),
    }
    found: dict[str, Way] = {}
    gated = ("retention", "gated deltanet")
    for name, recipe in mixers.items():
        found[name] = Way(recipe, tables=("mixers", "gate") if name in gated else ("mixers",))
        found[f"{name}, from scratch"] = Way(recipe, fresh=True)
    for name in gated:
        found[f"{name}, no gate"] = Way(swap(name.replace(" ", "_"), gate="none"), tables=("gate",))
    # What is carried over, how it is trained: on retention, as in the paper.
    for name, transfer in (("o_proj and mlp (XATL)", XATL), ("mlp only", ["mlp"]), ("neither", NONE)):
        found[f"retention, {name}"] = Way(swap("retention", transfer), tables=("components",))
    found["retention, o_proj and mlp, frozen then thawed"] = Way(swap("retention", XATL), "xatl", tables=("training",))
    found["retention, all, frozen then thawed"] = Way(swap("retention"), "xatl", tables=("training",))
    found["retention, all, aligned first"] = Way(swap("retention"), "align-then-distil", tables=("training",))
    found["retention, all, distilled"] = Way(swap("retention"), "distil", tables=("training",))
    found["gated deltanet, aligned first"] = Way(swap("gated_deltanet"), "align-then-distil", tables=("training",))
    found["gated deltanet, distilled"] = Way(swap("gated_deltanet"), "distil", tables=("training",))
    for name in ("hedgehog, window 32", "gated deltanet, attention at xatl's depths"):
        found[f"{name}, aligned first"] = Way(mixers[name], "align-then-distil", tables=("training",))
    # A fold and mixers, each alone and together: what is tied, and which layers keep attention, agree where both are.
    kept = swap("gated_deltanet", **{"except": KEPT})
    found["recursive"] = Way(FOLDED, tables=("together",))
    found["gated deltanet, attention in layers 1 and 3"] = Way(kept, tables=("together",))
    found["gated deltanet, attention in layer 1"] = Way(
        swap("gated_deltanet", **{"except": KEPT[:1]}), tables=("together",)
    )
    found["recursive hybrid: both"] = Way({**FOLDED, **kept}, tables=("together",))
    narrow = {**FOLDED["relax"], "rank": {"parameters": 0.1}}
    found["recursive hybrid, smaller LoRAs"] = Way({**FOLDED, "relax": narrow, **kept}, tables=("together",))
    found["recursive, all gated deltanet"] = Way({**FOLDED, **swap("gated_deltanet")}, tables=("together",))
    return found


WAYS = _ways()


def arguments() -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        work=Path("runs/mixers"),
        tokens=500_000,
        sweep_tokens=100_000,
        eval_tokens=50_000,
        rates=[1e-3, 3e-3, 9e-3],
        batch_tokens=4096,
    )
    parser.add_argument("--only", nargs="*", help="arms whose names hold one of these; =NAME is the arm of that name")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further run after so many minutes")
    return parser.parse_args()


def stages(way: Way, given: argparse.Namespace, rate: float, seed: int, tokens: int) -> Sequence[HealStage]:
    """Returns the healing stages at one learning rate; a protocol keeps the ratios of its stages' rates."""
    if way.protocol in ("next_token", "distil"):
        found = (HealStage.model_validate({"objective": way.protocol, "tokens": tokens}),)
    else:
        found = load_recipe({"heal": {"protocol": way.protocol, "tokens": tokens}}).heal
    changes = {"batch_tokens": given.batch_tokens, "context": given.context, "seed": seed}
    return tuple(
        stage.model_copy(update={**changes, "learning_rate": rate * (stage.learning_rate or MIDDLE_RATE) / MIDDLE_RATE})
        for stage in found
    )


def tokens_to_reach(goal: float, curve: list[tuple[int, float]]) -> float | None:
    """Returns the tokens after which a curve reaches `goal`, by linear interpolation, or None."""
    before: tuple[int, float] | None = None
    for tokens, value in curve:
        if value <= goal:
            if before is None or before[1] == value:
                return float(tokens)
            share = (before[1] - goal) / (before[1] - value)
            return before[0] + share * (tokens - before[0])
        before = (tokens, value)
    return None


def run_arm(name: str, way: Way, model: SourceModel, given: argparse.Namespace) -> dict[str, Any]:
    folder = arm_folder(given.work, name)
    recipe = load_recipe(way.recipe)
    plan = plan_model(model, recipe, allow_larger=True)
    if way.fresh:
        plan = scratch_plan(model, plan)
    start = folder / "converted"
    if not start.exists():
        carry_out(plan, model.source, start)
    unhealed = measure(start, folder / "unhealed.json", given).bits_per_byte
    chosen = Arm(start, folder, partial(stages, way, given), given, is_followed=True).choose()
    return {
        "tables": way.tables,
        "unhealed": unhealed,
        "sweep": {rate: found.bits_per_byte for rate, found in chosen.sweep.items()},
        "learning_rate": chosen.rate,
        "healed": {seed: run.found.bits_per_byte for seed, run in chosen.runs.items()},
        "curves": {seed: run.curve for seed, run in chosen.runs.items()},
        **costs(plan),
    }


def costs(plan: StackPlan) -> dict[str, Any]:
    target = plan.cost.target
    return {"weight_bytes": target.weight_bytes, "memory_8k": target.weight_bytes + target.cache_bytes(8192)}


def main() -> None:
    given = arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    model = read_source_model(given.source)
    source = measure(Path(given.source), given.work / "source.json", given).bits_per_byte
    started, results = time.perf_counter(), {}
    for name, way in WAYS.items():
        if given.only and not any(part == f"={name}" or part in name for part in given.only):
            continue
        if time.perf_counter() - started > 60 * given.minutes:
            print(f"{name}: not begun, {given.minutes:g} minutes are over", flush=True)
            continue
        results[name] = run_arm(name, way, model, given)
    facts = {"source": source, "results": results}
    (given.work / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    if given.write is not None:
        given.write.write_text(render(source, results, model, given))


def render(source: float, results: dict[str, Any], model: SourceModel, given: argparse.Namespace) -> str:
    """The page."""
    reference = plan_model(model, load_recipe({})).cost.source
    memory = reference.weight_bytes + reference.cache_bytes(8192)
    lines = [
        "# Mixers of linear cost: carried over and from scratch",
        "",
        f"Bits per byte on held-out text after {given.tokens:,} tokens, for each seed "
        f"({', '.join(map(str, given.seeds))}); the source, `{Path(given.source).name}`, has {source:.4f}. Lower is "
        "better. `at 8k`: weights, cache and state of one sequence of 8,192 tokens, beside the source's.",
        "",
        "## Each mixer, with all of the source's weights that fit, and from scratch",
        "",
        "Fewer tokens: how many times fewer tokens the transferred model needed for what the one from scratch had in "
        "the end (mean over seeds, from ten measurements of each run).",
        "",
        "| mixer | unhealed | transferred | from scratch | fewer tokens | learning rates | weights | at 8k |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        scratch = results.get(f"{name}, from scratch")
        if scratch is None or "mixers" not in row["tables"]:
            continue
        lines.append(
            f"| {name} | {row['unhealed']:.3f} | {_each(row)} | {_each(scratch)} | {_fewer(row, scratch, given)} "
            f"| {row['learning_rate']:g}, {scratch['learning_rate']:g} "
            f"| {row['weight_bytes'] / reference.weight_bytes:.2f}x | {row['memory_8k'] / memory:.2f}x |"
        )
    titles = {
        "components": "What is carried over",
        "training": "How it is trained",
        "gate": "With a gate, which is nearly closed at first, and without",
        "together": "Recursion and linear mixers, alone and together",
    }
    for table, title in titles.items():
        chosen = {name: row for name, row in results.items() if table in row["tables"]}
        if chosen:
            lines += ["", f"## {title}", ""]
            lines += ["| model | unhealed | healed | learning rate | weights | at 8k |", "|---|---|---|---|---|---|"]
            lines += [
                f"| {name} | {row['unhealed']:.3f} | {_each(row)} | {row['learning_rate']:g} "
                f"| {row['weight_bytes'] / reference.weight_bytes:.2f}x | {row['memory_8k'] / memory:.2f}x |"
                for name, row in chosen.items()
            ]
    lines += [
        "",
        "## How",
        "",
        f"Learning rates were chosen for each arm by runs of {given.sweep_tokens:,} tokens at "
        f"{', '.join(f'{rate:g}' for rate in given.rates)}; in protocols of several stages the stages keep the "
        f"proportions of their rates. Next-token prediction unless said otherwise, {given.batch_tokens:,} tokens a "
        f"step, context {given.context}, {given.eval_tokens:,} held-out tokens.",
        "",
        *command_lines(),
    ]
    return "\n".join(lines)


def _each(row: dict[str, Any]) -> str:
    values = list(row["healed"].values())
    return f"{' / '.join(f'{value:.4f}' for value in values)} (**{statistics.mean(values):.4f}**)"


def _fewer(row: dict[str, Any], scratch: dict[str, Any], given: argparse.Namespace) -> str:
    ratios = []
    for seed, curve in row["curves"].items():
        reached = tokens_to_reach(scratch["curves"][seed][-1][1], curve)
        if reached is None:
            return "never"
        ratios.append(given.tokens / reached)
    first = min(tokens for curve in row["curves"].values() for tokens, _ in curve)
    mean = statistics.mean(ratios)
    return f"at least {mean:.1f}" if mean >= given.tokens / first * 0.99 else f"{mean:.1f}"


if __name__ == "__main__":
    main()
