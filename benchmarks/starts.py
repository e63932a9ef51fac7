"""Losses of initialisations and other methods at equal shares of the source's linear weights, unhealed and healed.

    python benchmarks/starts.py --source MODEL --train TEXT --held-out TEXT --work runs/starts --write PAGE
    python benchmarks/starts.py ... --heal-tokens 1M --seeds 0 1 --rates 5e-4 1e-3 --heal-shares 0.67

Every arm at every size is one result under `--work`. An existing result is not measured again, so an interrupted
script continues. Moments of calibration text are measured once for all arms. Healing comes last: short runs choose the
learning rate of each arm, and then each seed is trained with it. The source is healed in the same way.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from arms import Arm as HealedArm
from page import Page
from starts_page import Found, Row, draw, render

from refold.blueprint.cost import count_parameters
from refold.blueprint.integers import SCHEMES
from refold.blueprint.quantisation import quantised_bytes
from refold.blueprint.schema import POOLS, Blueprint, Pool
from refold.conversion.convert import carry_out
from refold.conversion.measured import keep_moments
from refold.data.readers import open_data
from refold.errors import RecipeError
from refold.evaluation.evaluate import evaluate
from refold.evaluation.result import Evaluation
from refold.evaluation.settings import EvaluationSettings
from refold.fields import read_amount
from refold.planning.build import identity_blueprint
from refold.planning.factors import stored_linears, stored_share
from refold.planning.plan import Plan, plan_model
from refold.recipe.heal import HealStage
from refold.recipe.load import load_recipe
from refold.sources.source_model import SourceModel, read_source_model

SHARES = (0.67, 0.6, 0.5, 0.75, 0.45)
NUMBER_BYTES = 2
"""Bytes per number that is not quantised: bfloat16, for any dtype of the source."""
Recipe = dict[str, Any]


class Arm(NamedTuple):
    """A method: a function from a share of the linear weights to a recipe, or None if it has no such size."""

    recipe: Callable[[float, SourceModel], Recipe | None]
    is_ours: bool = False


def _fold(share: float, model: SourceModel, ends: int, **relax: Any) -> Recipe | None:
    """Returns a recipe of two loops between `ends` untied layers on each side, with LoRAs for the rest of the share."""
    layers = model.arch.num_layers
    stored = (layers + 2 * ends) / 2 / layers
    if share <= stored + 0.01:
        return None
    rank = {"parameters": round(share - stored, 6), **relax.pop("rank", {})}
    return {"fold": {"loops": 2, "prelude": ends, "coda": ends}, "relax": {"rank": rank, **relax}}


def _lowrank(**factor: Any) -> Arm:
    return Arm(lambda share, model: {"factor": {"parameters": share, **factor}}, factor.get("weight") == "fisher")


def _sequential(arm: Arm) -> Arm:
    """Returns the same recipe with linears fitted in sequence to their inputs in the folded model."""

    def recipe(share: float, model: SourceModel) -> Recipe | None:
        made = arm.recipe(share, model)
        return made and {**made, "calibration": {"order": "sequential"}}

    return Arm(recipe, is_ours=True)


def _aligned(arm: Arm) -> Arm:
    """Returns the same recipe with tied layers aligned first."""

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


def _width(**options: Any) -> Arm:
    """Returns the arm that keeps the same share of neurons and of key-value heads, or divides it by measurement."""

    def recipe(share: float, model: SourceModel) -> Recipe:
        return {"width": {"mlp": share, "heads": share, **options}}

    return Arm(recipe, is_ours=options.get("weight") == "fisher")


def _narrow_mlps(share: float, model: SourceModel) -> Recipe | None:
    """Returns the recipe whose MLPs alone lose neurons, down to the share of all linear weights."""
    identity = identity_blueprint(model.arch)
    weights = {pool: count_linears(identity, pool) for pool in POOLS}
    kept = 1 - (1 - share) * sum(weights.values()) / weights["mlp"]
    options = {"split": "measured", "weight": "fisher"}
    return {"width": {"mlp": round(kept, 6), **options}} if kept > 0 else None


def count_linears(blueprint: Blueprint, pool: Pool) -> int:
    """Returns the weights of all linears of one pool."""
    return sum(rows * columns for own, *_, (rows, columns) in stored_linears(blueprint) if own == pool)


def _pruned(by: str, replace: str = "none") -> Arm:
    def recipe(share: float, model: SourceModel) -> Recipe:
        layers = model.arch.num_layers
        return {"drop": {"block": {"count": layers - math.floor(share * layers), "by": by, "replace": replace}}}

    return Arm(recipe)


def _joint(**relax: Any) -> Arm:
    return Arm(lambda share, model: _fold(share, model, 1, init="joint", vectors="own", **relax), is_ours=True)


def _basis(share: float, model: SourceModel) -> Recipe:
    return {
        "fold": {"loops": 2, "pattern": "sequence", "uneven": "prelude"},
        "factor": {"parameters": share, "share": "basis", "weight": "activations"},
    }


ARMS = {
    "depth pruning, evenly": _pruned("even"),
    "depth pruning, by measured influence": _pruned("similarity"),
    "depth pruning, by measured influence, linear maps in place (ReplaceMe)": _pruned("similarity", "linear"),
    "width, by norms, nothing refitted": _width(weight="none"),
    "width, weight: activations, measured": _width(weight="activations", split="measured"),
    "width, weight: fisher, evenly": _width(weight="fisher"),
    "width, weight: fisher, measured": _width(weight="fisher", split="measured"),
    "width of MLPs alone, weight: fisher, measured": Arm(_narrow_mlps, is_ours=True),
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
    "basis shared by neighbours (Basis Sharing), weight: activations": Arm(_basis),
    "tied where it pays (fisher, measured), ends untied": _compact(1),
    "tied where it pays (fisher, measured), all tied": _compact(0),
}
CALIBRATED = ("low rank, weight: fisher, measured ranks", "the same, weight: activations")
"""Arms that are made with other amounts of calibration text, and with other text, too."""
QUANTISED = ("low rank, weight: fisher, measured ranks", "the same, weight: fisher, measured ranks")
"""Arms whose targets are measured with quantised weights, too."""
HEALED = (
    "depth pruning, by measured influence",
    "the paper's: Average + SVD",
    "the same, weight: fisher, measured ranks",
    "low rank, weight: activations (SVD-LLM)",
    "low rank, weight: fisher, measured ranks",
    "tied where it pays (fisher, measured), ends untied",
)
"""Arms that are healed unless others are named."""


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
    parser.add_argument("--dtype", default="float32", help="evaluations compute in it; many CPUs are slow in bfloat16")
    parser.add_argument("--heal-tokens", type=read_amount, default=0, help="heal some arms for so long; 0: none")
    parser.add_argument("--heal-arms", nargs="+", choices=list(ARMS), default=list(HEALED), metavar="ARM")
    parser.add_argument("--heal-shares", type=float, nargs="+", default=[0.67])
    parser.add_argument("--sweep-tokens", type=read_amount, default=200_000, help="of each run that tries a rate")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--batch-tokens", type=read_amount, default=8192, help="of a healing step")
    parser.add_argument("--without", nargs="*", default=[], help="leave out arms whose names hold one of these")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="begin nothing further after so many minutes; 0: only the page"
    )
    parser.add_argument("--write", type=Path, help="page to write")
    return parser.parse_args()


def moments_folder(given: argparse.Namespace, text: Path, tokens: int) -> Path:
    return given.work / f"moments-{text.stem}-{tokens}"


def moments(given: argparse.Namespace, text: Path, tokens: int) -> Path:
    folder = moments_folder(given, text, tokens)
    if not (folder / "moments.json").exists():
        started = time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        recipe = {
            "factor": {"parameters": 0.5, "weight": "fisher"},
            "calibration": {"tokens": tokens, "context": given.context},
        }
        keep_moments(given.source, recipe, open_data([text]), folder)
        print(f"moments of {tokens:,} tokens of {text.stem}: {time.perf_counter() - started:.0f} s", flush=True)
    return folder


@dataclass(frozen=True)
class Study:
    """The common state of all arms: source, arguments and work folder."""

    model: SourceModel
    given: argparse.Namespace
    started: float = field(default_factory=time.perf_counter)

    @property
    def has_time(self) -> bool:
        return time.perf_counter() - self.started < 60 * self.given.minutes

    def evaluate(self, model: str | Path, scheme: str | None = None) -> Evaluation:
        given = self.given
        settings = EvaluationSettings(
            context=given.context, max_tokens=given.eval_tokens, dtype=given.dtype, quantise=scheme
        )
        return evaluate(model, given.held_out, settings)

    def source(self, scheme: str | None = None) -> Row:
        """Returns the result of the source, whole or quantised."""
        path = self.given.work / f"source-{scheme or 'whole'}.json"
        if not path.exists():
            blueprint = identity_blueprint(self.model.arch)
            _keep(path, self._row(self.evaluate(self.given.source, scheme), blueprint, scheme, flops=1.0))
        return json.loads(path.read_text())

    def convert(self, recipe: Recipe, folder: Path, out: Path) -> Plan | None:
        """Converts one target with the moments of a folder; returns None if the recipe does not fit."""
        given, sizes = self.given, {"tokens": self.given.tokens, "context": self.given.context}
        calibration = {**recipe.get("calibration", {}), **sizes}
        try:
            plan = plan_model(self.model, load_recipe({**recipe, "calibration": calibration}), allow_larger=True)
            reads = plan.recipe.measures_influence or plan.recipe.fits_in_sequence or plan.recipe.replaces
            text = open_data([given.train]) if reads else None
            moments_folder = folder if plan.recipe.needs_text else None
            return carry_out(plan, self.model.source, out, calibration=text, moments=moments_folder)
        except RecipeError as error:
            print(f"{recipe}: {error}", flush=True)
            return None

    def run(self, name: str, share: float, recipe: Recipe, folder: Path) -> dict[str | None, Row]:
        """Converts, measures and deletes one target, unless its result exists, the recipe does not fit or time is over.

        Returns:
            Results by scheme of quantisation: None for the whole model, and the schemes of an arm in `QUANTISED`.
        """
        schemes = (None, *SCHEMES) if name in QUANTISED and folder.name == self._first else (None,)
        paths = {
            scheme: self.given.work / f"{_slug(name)}-{share:g}-{folder.name}-{scheme or 'whole'}.json"
            for scheme in schemes
        }
        if not all(path.exists() for path in paths.values()):
            if not self.has_time:
                return {}
            started, out = time.perf_counter(), self.given.work / "target"
            shutil.rmtree(out, ignore_errors=True)
            made = self.convert(recipe, folder, out)
            if made is None:
                return {}
            flops = made.cost.target.flops_per_token / made.cost.source.flops_per_token
            for scheme, path in paths.items():
                if not path.exists():
                    _keep(path, self._row(self.evaluate(out, scheme), made.blueprint, scheme, flops))
            shutil.rmtree(out)
            print(f"{name} at {share:g}: {time.perf_counter() - started:.0f} s", flush=True)
        return {scheme: json.loads(path.read_text()) for scheme, path in paths.items()}

    def is_healed(self, name: str, share: float) -> bool:
        """Returns whether all seeds of an arm are healed already."""
        found = self._healed_folder(name, share).glob(f"*-{self.given.heal_tokens}.json")
        return len(list(found)) >= len(self.given.seeds)

    def heal(self, name: str, share: float, recipe: Recipe, folder: Path) -> Row | None:
        """Heals one target with each seed at the best rate of short runs; returns None if the recipe does not fit."""
        place = self._healed_folder(name, share)
        if not (place / "converted").exists() and self.convert(recipe, folder, place / "converted") is None:
            return None
        return self._healed(place / "converted", place)

    def _healed_folder(self, name: str, share: float) -> Path:
        return self.given.work / "healed" / f"{_slug(name)}-{share:g}"

    def heal_source(self) -> Row:
        return self._healed(Path(self.given.source), self.given.work / "healed" / "source")

    def _healed(self, start: Path, place: Path) -> Row:
        given = self.given
        place.mkdir(parents=True, exist_ok=True)
        # Of all that arms are given, only this has another meaning here: tokens of calibration text.
        healing = argparse.Namespace(**{**vars(given), "tokens": given.heal_tokens})

        def stages(rate: float, seed: int, tokens: int) -> tuple[HealStage]:
            size = {"batch_tokens": given.batch_tokens, "context": given.context}
            return (HealStage(tokens=tokens, learning_rate=rate, seed=seed, **size),)

        chosen = HealedArm(start, place, stages, healing).choose()
        return {
            "rate": chosen.rate,
            "nats": {seed: math.log(run.found.perplexity) for seed, run in chosen.runs.items()},
        }

    def _row(self, found: Evaluation, blueprint: Blueprint, scheme: str | None, flops: float) -> Row:
        source = identity_blueprint(blueprint.arch)
        sizes = [count_bytes(each, by) for each, by in ((blueprint, scheme), (source, None))]
        return {
            "share": stored_share(blueprint, source),
            "bytes": sizes[0] / sizes[1],
            "nats": math.log(found.perplexity),
            "bits_per_byte": found.bits_per_byte,
            "flops": flops,
        }

    @property
    def _first(self) -> str:
        return moments_folder(self.given, self.given.train, self.given.tokens).name


def count_bytes(blueprint: Blueprint, scheme: str | None) -> int:
    """Weight bytes of a blueprint, two for each number that is not quantised."""
    if scheme is None:
        return NUMBER_BYTES * count_parameters(blueprint).total
    return quantised_bytes(blueprint, NUMBER_BYTES, SCHEMES[scheme])


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _keep(path: Path, row: Row) -> None:
    path.write_text(json.dumps(row) + "\n")
    print(f"{path.stem}: {row}", flush=True)


def main() -> int:
    given = arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    study = Study(read_source_model(given.source), given)
    found = Found(given, study.source(), {scheme: study.source(scheme) for scheme in SCHEMES})
    folder = moments(given, given.train, given.tokens)
    for share in given.shares:
        for name, arm in ARMS.items():
            recipe = arm.recipe(share, study.model)
            left_out = any(part in name for part in given.without)
            if recipe is not None and not left_out:
                for scheme, row in study.run(name, share, recipe, folder).items():
                    found.rows[name, share, scheme] = row
    wanted = [(given.train, tokens) for tokens in given.more_tokens]
    wanted += [(given.other, given.tokens)] if given.other else []
    for text, tokens in wanted:
        for name in CALIBRATED:
            recipe = ARMS[name].recipe(given.shares[0], study.model)
            there = (moments_folder(given, text, tokens) / "moments.json").exists()
            if recipe is not None and (there or study.has_time):
                row = study.run(name, given.shares[0], recipe, moments(given, text, tokens)).get(None)
                if row is not None:
                    found.calibrated[name, f"{tokens:,} tokens of {text.stem}"] = row
    if given.heal_tokens:
        found.healed_source = study.heal_source()
        for share in given.heal_shares:
            for name in given.heal_arms:
                recipe = ARMS[name].recipe(share, study.model)
                if recipe is not None and (study.has_time or study.is_healed(name, share)):
                    row = study.heal(name, share, recipe, folder)
                    if row is not None:
                        found.healed[name, share] = row
    page = Page("Starts and their rivals", seed=0)
    render(page, found, list(ARMS), [name for name, arm in ARMS.items() if arm.is_ours])
    if given.write is not None:
        draw(found, list(ARMS)).savefig(given.write.with_suffix(".png"), dpi=150)
    return page.finish(given.write)


if __name__ == "__main__":
    sys.exit(main())
