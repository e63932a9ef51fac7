"""The demo: folds the shipped model in several ways, heals three of the results, and compares all in a table."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refold.checkpoint.atomic_file import require_writable
from refold.conversion.convert import ConvertOptions, carry_out
from refold.conversion.measured import reads_text
from refold.data.readers import DataSource
from refold.evaluation.evaluate import evaluate
from refold.evaluation.reference import Reference
from refold.evaluation.result import Evaluation
from refold.evaluation.settings import EvaluationSettings
from refold.generation.generate import generate
from refold.generation.sampling import Sampling
from refold.healing.heal import heal
from refold.healing.run import HealOptions
from refold.planning.plan import Draft, Plan, plan_model
from refold.progress import Say
from refold.recipe.heal import HealStage
from refold.recipe.load import load_recipe
from refold.recipe.recipe import Recipe
from refold.sources.source_model import SourceModel, read_source_model
from refold.studies.baselines import pruned_recipe
from refold.studies.run import report_line
from refold.studies.shipped import held_out_data, shipped_model, training_data

HEAL_TOKENS = 100_000
EVAL_TOKENS = 16_000
CALIBRATION_TOKENS = 32_768
CONTEXT = 512
PROMPT = "def load(path):\n"
LOW_RANK = "low rank (lowrank)"
FOLDS = {LOW_RANK: "lowrank", "relaxed, joint start (joint)": "joint"}
"""Folds that are healed, by name, with their recipes."""
PRUNED = "pruned to the strict size"
PRUNED_ALIKE = "pruned to lowrank's size"


@dataclass
class DemoRow:
    """Holds the figures of one model of the table."""

    name: str
    folder: Path
    plan: Plan | None
    before: Evaluation
    after: Evaluation | None = None

    @property
    def weight_bytes(self) -> int:
        return self.before.model.weight_bytes


@dataclass(frozen=True)
class DemoResult:
    """Holds the figures of the demo.

    Attributes:
        rows: The table, source first.
        samples: Continuations of `PROMPT` by the source and by the best healed fold.
        line: The report of the best healed fold.
        context: Number of tokens for the comparison of caches.
    """

    rows: list[DemoRow]
    samples: dict[str, str] = field(default_factory=dict)
    line: str = ""
    context: int = 0


def demo(folder: Path, *, heal_tokens: int = HEAL_TOKENS, say: Say = lambda text: None) -> DemoResult:
    """Folds the shipped model in several ways, heals three of the results and evaluates all of them.

    Args:
        folder: Folder for the folded models; those of an earlier demo are replaced.
        heal_tokens: Healing tokens of each of the three.
        say: Called with a line when a part begins.

    Raises:
        RefoldError: The errors of the stages.
    """
    require_writable(folder.absolute())
    source, held_out = shipped_model(), held_out_data()
    against = Reference(source, device="cpu")

    def measure(model: Path) -> Evaluation:
        return evaluate(
            model,
            held_out,
            EvaluationSettings(context=CONTEXT, stride=CONTEXT, max_tokens=EVAL_TOKENS, device="cpu"),
            against=against,
        )

    training = training_data()
    say("measuring the source")
    rows = [DemoRow("source", source, None, measure(source))]
    model = read_source_model(source)
    for name, recipe in _arms().items():
        rows.append(_row(name, plan_model(model, recipe, allow_larger=True), model, folder, training, measure, say))
    by_name = {row.name: row for row in rows}
    low_rank, pruned = by_name[LOW_RANK], by_name[PRUNED]
    assert low_rank.plan is not None
    assert pruned.plan is not None
    same_size = plan_model(model, pruned_recipe(low_rank.plan), influence=pruned.plan.influence)
    rows.append(_row(PRUNED_ALIKE, same_size, model, folder, training, measure, say))
    for row in rows:
        if row.name in (*FOLDS, PRUNED_ALIKE):
            row.after = _heal(row, folder, training, heal_tokens, measure, say)
    say("writing samples")
    best = min((row for row in rows if row.name in FOLDS), key=_healed_difference)
    healed = folder / f"{_slug(best.name)}-healed"
    samples = {
        name: generate(model, PROMPT, Sampling(max_new_tokens=48), device="cpu")
        for name, model in (("source", source), (f"{best.name}, healed", healed))
    }
    return DemoResult(rows, samples, _line(best, rows[-1]), low_rank.plan.blueprint.arch.max_position_embeddings)


def _arms() -> dict[str, Recipe]:
    relaxed: dict[str, Any] = {"fold": {"loops": 2}}
    text = [f"calibration.tokens={CALIBRATION_TOKENS}"]
    return {
        **{name: load_recipe(recipe, text) for name, recipe in FOLDS.items()},
        "tied or low rank (compact)": load_recipe("compact", text),
        "strict recursive": load_recipe("recursive"),
        "relaxed, rank 16": load_recipe({**relaxed, "relax": {"rank": 16, "init": "svd"}}),
        "relaxed, full rank": load_recipe({**relaxed, "relax": {"rank": "full", "vectors": "own"}}),
        PRUNED: load_recipe("pruned", text),
    }


def _row(
    name: str,
    draft: Draft,
    model: SourceModel,
    folder: Path,
    training: DataSource,
    measure: Callable[[Path], Evaluation],
    say: Say,
) -> DemoRow:
    say(f"folding: {name}")
    target = folder / _slug(name)
    made = carry_out(
        draft,
        model.source,
        target,
        options=ConvertOptions(overwrite=True),
        calibration=training if reads_text(draft) else None,
    )
    return DemoRow(name, target, made, measure(target))


def _heal(
    row: DemoRow,
    folder: Path,
    training: DataSource,
    tokens: int,
    measure: Callable[[Path], Evaluation],
    say: Say,
) -> Evaluation:
    say(f"healing: {row.name}, {tokens:,} tokens")
    target = folder / f"{_slug(row.name)}-healed"
    heal(
        row.folder,
        target,
        training,
        HealStage(tokens=tokens),
        options=HealOptions(device="cpu", overwrite=True, restart=True),
    )
    return measure(target)


def _healed_difference(row: DemoRow) -> float:
    assert row.after is not None
    assert row.after.against is not None
    return row.after.against.difference


def _line(best: DemoRow, pruned: DemoRow) -> str:
    assert best.plan is not None
    assert best.after is not None
    assert best.after.against is not None
    context = best.plan.blueprint.arch.max_position_embeddings
    found, lost = best.after.against, {pruned.name: _healed_difference(pruned)}
    return report_line(FOLDS[best.name], best.plan, found.difference, found.difference_error, lost, context)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")
