"""What starts and their rivals lose before any healing, at equal shares of the source's linear weights.

    python benchmarks/starts.py --source MODEL --train TEXT --held-out TEXT --work runs/starts --write PAGE

Every arm at every size is one result under `--work`, and one that is there is not made again, so the script goes on
where it was interrupted. Moments of calibration text are measured once and used by all arms.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from page import Page, table

from refold.blueprint.build import identity_blueprint
from refold.blueprint.factors import stored_share
from refold.blueprint.load import load_recipe
from refold.blueprint.numbers import read_amount
from refold.conversion.convert import carry_out
from refold.conversion.measured import keep_moments
from refold.conversion.plan import plan_model
from refold.data.readers import open_data
from refold.errors import RecipeError
from refold.evaluation.evaluate import evaluate
from refold.evaluation.result import Evaluation, read_evaluation
from refold.measuring.source_model import SourceModel, read_source_model

SHARES = (0.67, 0.6, 0.5, 0.75, 0.45)
Recipe = dict[str, Any]


class Arm(NamedTuple):
    """One way to a size: a recipe for a share of the linear weights; None where it has none of that size."""

    recipe: Callable[[float, SourceModel], Recipe | None]
    is_ours: bool = False


def _fold(share: float, model: SourceModel, ends: int, **relax: Any) -> Recipe | None:
    """Two loops between `ends` untied layers on either side, and LoRAs for what the share leaves."""
    layers = model.arch.num_layers
    stored = (layers + 2 * ends) / 2 / layers
    if share <= stored + 0.01:
        return None
    rank = {"parameters": round(share - stored, 6), **relax.pop("rank", {})}
    return {"fold": {"loops": 2, "prelude": ends, "coda": ends}, "relax": {"rank": rank, **relax}}


def _lowrank(**factor: Any) -> Arm:
    return Arm(lambda share, model: {"factor": {"parameters": share, **factor}}, factor.get("weight") == "fisher")


def _sequential(arm: Arm) -> Arm:
    """The same, each linear fitted by what it sees in the model folded so far."""

    def recipe(share: float, model: SourceModel) -> Recipe | None:
        made = arm.recipe(share, model)
        return made and {**made, "calibration": {"order": "sequential"}}

    return Arm(recipe, is_ours=True)


def _aligned(arm: Arm) -> Arm:
    """The same, tied layers brought into a common frame first."""

    def recipe(share: float, model: SourceModel) -> Recipe | None:
        made = arm.recipe(share, model)
        return made and {**made, "fold": {**made["fold"], "align": "both"}}

    return Arm(recipe, is_ours=True)


def _compact(ends: int) -> Arm:
    def recipe(share: float, model: SourceModel) -> Recipe:
        return {
            "fold": {"loops": 2, "prelude": ends, "coda": ends},
            "relax": {"rank": {"split": "measured"}, "init": "joint", "vectors": "own"},
            "factor": {"parameters": share, "split": "measured", "weight": "fisher"},
        }

    return Arm(recipe, is_ours=True)


def _pruned(share: float, model: SourceModel) -> Recipe:
    layers = model.arch.num_layers
    return {"drop": {"block": {"count": layers - math.floor(share * layers)}}}


def _joint(**relax: Any) -> Arm:
    return Arm(lambda share, model: _fold(share, model, 1, init="joint", vectors="own", **relax), is_ours=True)


ARMS = {
    "depth pruning, evenly": Arm(_pruned),
    "the paper's: Average + SVD": Arm(lambda share, model: _fold(share, model, 0, init="svd")),
    "joint, own norms, ends untied, no data": _joint(),
    "the same, no data, aligned": _aligned(_joint()),
    "the same, weight: activations": _joint(weight="activations"),
    "the same, weight: activations, aligned": _aligned(_joint(weight="activations")),
    "the same, weight: activations, sequential": _sequential(_joint(weight="activations")),
    "the same, weight: activations, aligned, sequential": _sequential(_aligned(_joint(weight="activations"))),
    "the same, weight: fisher, measured ranks": _joint(weight="fisher", rank={"split": "measured"}),
    "low rank, weight: activations (SVD-LLM)": _lowrank(weight="activations"),
    "low rank, weight: activations, sequential": _sequential(_lowrank(weight="activations")),
    "low rank, weight: activations, measured ranks": _lowrank(weight="activations", split="measured"),
    "low rank, weight: fisher, measured ranks": _lowrank(weight="fisher", split="measured"),
    "low rank, weight: fisher, measured ranks, sequential": _sequential(_lowrank(weight="fisher", split="measured")),
    "tied where it pays (fisher, measured), ends untied": _compact(1),
    "tied where it pays (fisher, measured), all tied": _compact(0),
}
CALIBRATED = ("low rank, weight: fisher, measured ranks", "the same, weight: activations")
"""Arms that are made with other amounts of calibration text, and with other text, too."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--other", type=Path, help="calibration text of another kind")
    parser.add_argument("--work", type=Path, default=Path("runs/starts"))
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--tokens", type=read_amount, default=65_536, help="of calibration text")
    parser.add_argument("--more-tokens", type=read_amount, nargs="*", default=[], help="further amounts, at one size")
    parser.add_argument("--eval-tokens", type=read_amount, default=32_768)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing further after so many minutes")
    parser.add_argument("--write", type=Path, help="page to write")
    return parser.parse_args()


class Calibrated(NamedTuple):
    """Calibration text, how much of it, and its moments."""

    text: Path
    tokens: int
    folder: Path


def moments(given: argparse.Namespace, text: Path, tokens: int) -> Calibrated:
    folder = given.work / f"moments-{text.stem}-{tokens}"
    if not (folder / "moments.json").exists():
        started = time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        recipe = {
            "factor": {"parameters": 0.5, "weight": "fisher"},
            "calibration": {"tokens": tokens, "context": given.context},
        }
        keep_moments(given.source, recipe, open_data([text]), folder)
        print(f"moments of {tokens:,} tokens of {text.stem}: {time.perf_counter() - started:.0f} s", flush=True)
    return Calibrated(text, tokens, folder)


def run_one(
    name: str, share: float, recipe: Recipe, model: SourceModel, found: Calibrated, given: argparse.Namespace
) -> dict[str, Any] | None:
    """Converts, measures and forgets one target, once; None where the recipe does not fit."""
    folder = found.folder
    if "calibration" in recipe:
        sizes = {"tokens": found.tokens, "context": given.context}
        recipe = {**recipe, "calibration": {**recipe["calibration"], **sizes}}
    slug = "".join(letter if letter.isalnum() else "-" for letter in name)
    path = given.work / f"{slug}-{share:g}-{folder.name}.json"
    if not path.exists():
        started, out = time.perf_counter(), given.work / "target"
        shutil.rmtree(out, ignore_errors=True)
        try:
            plan = plan_model(model, load_recipe(recipe), allow_larger=True)
            text = open_data([found.text]) if plan.recipe.fits_in_sequence else None
            kept = folder if plan.recipe.needs_text else None
            made = carry_out(plan, model.source, out, moments=kept, calibration=text)
        except RecipeError as error:
            print(f"{name} at {share:g}: {error}", flush=True)
            return None
        result = evaluate(out, given.held_out, context=given.context, max_tokens=given.eval_tokens)
        shutil.rmtree(out)
        cost = made.cost
        row = {
            "share": stored_share(made.blueprint, identity_blueprint(made.blueprint.arch)),
            "nats": math.log(result.perplexity),
            "bits_per_byte": result.bits_per_byte,
            "flops": cost.target.flops_per_token / cost.source.flops_per_token,
        }
        path.write_text(json.dumps(row) + "\n")
        print(f"{name} at {share:g}: {row}, {time.perf_counter() - started:.0f} s", flush=True)
    return json.loads(path.read_text())


def main() -> int:
    given = arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    model = read_source_model(given.source)
    page = Page("Starts and their rivals, before healing", seed=0)
    reference = given.work / "source.json"
    if not reference.exists():
        evaluate(given.source, given.held_out, context=given.context, max_tokens=given.eval_tokens).write(reference)
    source = read_evaluation(reference)
    started, rows = time.perf_counter(), {}
    main_text = moments(given, given.train, given.tokens)
    for share in given.shares:
        for name, arm in ARMS.items():
            recipe = arm.recipe(share, model)
            if recipe is not None and time.perf_counter() - started < 60 * given.minutes:
                rows[name, share] = run_one(name, share, recipe, model, main_text, given)
    other: dict[tuple[str, str], dict[str, Any] | None] = {}
    wanted = [(given.train, tokens) for tokens in given.more_tokens]
    wanted += [(given.other, given.tokens)] if given.other else []
    for text, tokens in wanted:
        for name in CALIBRATED:
            recipe = ARMS[name].recipe(given.shares[0], model)
            if recipe is not None and time.perf_counter() - started < 60 * given.minutes:
                where = moments(given, text, tokens)
                row = run_one(name, given.shares[0], recipe, model, where, given)
                other[name, f"{tokens:,} tokens of {text.stem}"] = row
    render(page, source, {key: row for key, row in rows.items() if row}, other, given)
    return page.finish(given.write)


def render(page: Page, reference: Evaluation, rows: dict, other: dict, given: argparse.Namespace) -> None:
    """Writes the sections and targets of the page."""
    source = math.log(reference.perplexity)
    shares = sorted({share for _, share in rows})

    def cell(name: str, share: float) -> str:
        row = rows.get((name, share))
        if row is None:
            return "-"
        off = "" if abs(row["share"] - share) < 0.01 else f" ({row['share']:.0%})"
        return f"+{row['nats'] - source:.3f}{off}"

    page.section(
        "Loss over the source, in nats per token",
        f"The source, `{Path(given.source).name}`, has {source:.4f} on {given.eval_tokens:,} held-out tokens (context "
        f"{given.context}). Columns: share of its linear weights that is stored, LoRAs included; in brackets where it "
        f"is another. Moments come from {given.tokens:,} tokens of `{given.train.name}`.\n\n"
        + table(
            ["start", *(f"{share:.0%}" for share in shares)],
            [[name, *(cell(name, share) for share in shares)] for name in ARMS],
        ),
    )
    page.section(
        "The same arms at one size",
        table(
            ["start", "stored", "bits per byte over the source", "FLOPs"],
            [
                [
                    name,
                    f"{row['share']:.1%}",
                    f"+{row['bits_per_byte'] - reference.bits_per_byte:.4f}",
                    f"{row['flops']:.2f}x",
                ]
                for (name, share), row in rows.items()
                if share == given.shares[0]
            ],
        ),
    )
    if other:
        lines = [[name, text, f"+{row['nats'] - source:.3f}"] for (name, text), row in other.items() if row]
        page.section(f"Other calibration text, at {given.shares[0]:.0%}", table(["start", "text", "nats"], lines))
    ours = [name for name, arm in ARMS.items() if arm.is_ours]
    for share, most in ((0.67, 0.08), (0.6, 0.15)):
        found = {name: rows[name, share]["nats"] - source for name in ours if (name, share) in rows}
        if found:
            best = min(found, key=lambda name: found[name])
            page.target(f"at {share:.0%} at most +{most} nats", f"+{found[best]:.3f} ({best})", found[best] <= most)
    rival = "low rank, weight: activations (SVD-LLM)"
    for share in shares:
        found = {name: rows[name, share]["nats"] - source for name in ours if (name, share) in rows}
        if share >= 0.5 and found and (rival, share) in rows:
            best, theirs = min(found.values()), rows[rival, share]["nats"] - source
            page.target(f"at {share:.0%} below whitened low rank", f"+{best:.3f} against +{theirs:.3f}", best < theirs)


if __name__ == "__main__":
    sys.exit(main())
