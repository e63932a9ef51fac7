"""What refold is for, on the model it ships: a table of folds, two of them healed, and what they write."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refold.conversion.convert import carry_out
from refold.conversion.measured import reads_text
from refold.data.readers import DataSource
from refold.evaluation.evaluate import evaluate
from refold.evaluation.reference import Reference
from refold.evaluation.result import Evaluation
from refold.generation.generate import generate
from refold.generation.sampling import Sampling
from refold.healing.heal import heal
from refold.planning.plan import Plan, plan_model
from refold.recipe.heal import HealStage
from refold.recipe.load import load_recipe
from refold.recipe.recipe import Recipe
from refold.sources.source_model import SourceModel, read_source_model
from refold.studies.baselines import pruned_recipe
from refold.studies.run import Say, report_line
from refold.studies.shipped import held_out_data, shipped_model, training_data

HEAL_TOKENS = 100_000
EVAL_TOKENS = 16_000
INFLUENCE_TOKENS = 16_384
CONTEXT = 512
LEARNING_RATE = 1e-3
PROMPT = "def load(path):\n"
HEALED = ("relaxed, joint start", "pruned to that size")
PRUNED = "pruned to the strict size"


@dataclass
class DemoRow:
    """One model of the table."""

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
    """What the demo found.

    Attributes:
        rows: The table, source first.
        samples: What source and healed model write after `PROMPT`.
        line: The report of the healed model.
        context: Tokens at which caches are compared.
    """

    rows: list[DemoRow]
    samples: dict[str, str] = field(default_factory=dict)
    line: str = ""
    context: int = 0


def demo(folder: Path, *, heal_tokens: int = HEAL_TOKENS, say: Say = lambda text: None) -> DemoResult:
    """Folds the shipped model in several ways, heals two of the results, measures all.

    Args:
        folder: Where the folded models are left; ones of an earlier demo are replaced.
        heal_tokens: Healing tokens for each of the two.
        say: Told what begins.

    Raises:
        RefoldError: As the stages do.
    """
    source, held_out = shipped_model(), held_out_data()
    against = Reference(source, device="cpu")

    def measure(model: Path) -> Evaluation:
        return evaluate(
            model, held_out, against=against, context=CONTEXT, stride=CONTEXT, max_tokens=EVAL_TOKENS, device="cpu"
        )

    training = training_data()
    say("measuring the source")
    rows = [DemoRow("source", source, None, measure(source))]
    model = read_source_model(source)
    for name, recipe in _arms().items():
        rows.append(_row(name, plan_model(model, recipe, allow_larger=True), model, folder, training, measure, say))
    by_name = {row.name: row for row in rows}
    joint, pruned = by_name[HEALED[0]], by_name[PRUNED]
    assert joint.plan is not None
    assert pruned.plan is not None
    same_size = plan_model(model, pruned_recipe(joint.plan), influence=pruned.plan.influence)
    rows.append(_row(HEALED[1], same_size, model, folder, training, measure, say))
    for row in rows:
        if row.name in HEALED:
            row.after = _heal(row, folder, training, heal_tokens, measure, say)
    say("writing samples")
    healed = folder / f"{_slug(joint.name)}-healed"
    samples = {
        name: generate(model, PROMPT, Sampling(max_new_tokens=48), device="cpu")
        for name, model in (("source", source), (joint.name, healed))
    }
    return DemoResult(rows, samples, _line(rows), joint.plan.blueprint.arch.max_position_embeddings)


def _arms() -> dict[str, Recipe]:
    relaxed: dict[str, Any] = {"fold": {"loops": 2}}
    full = {**relaxed, "relax": {"rank": "full", "vectors": "own"}}
    return {
        "strict recursive": load_recipe("recursive"),
        **{
            f"relaxed, rank {rank}": load_recipe({**relaxed, "relax": {"rank": rank, "init": "svd"}})
            for rank in (8, 16, 32)
        },
        "relaxed, full rank": load_recipe(full),
        HEALED[0]: load_recipe("joint"),
        PRUNED: load_recipe("pruned", [f"calibration.tokens={INFLUENCE_TOKENS}"]),
    }


def _row(
    name: str,
    plan: Plan,
    model: SourceModel,
    folder: Path,
    training: DataSource,
    measure: Callable[[Path], Evaluation],
    say: Say,
) -> DemoRow:
    say(f"folding: {name}")
    target = folder / _slug(name)
    made = carry_out(plan, model.source, target, overwrite=True, calibration=training if reads_text(plan) else None)
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
    stage = HealStage(tokens=tokens, learning_rate=LEARNING_RATE, batch_tokens=4096, context=CONTEXT)
    target = folder / f"{_slug(row.name)}-healed"
    heal(row.folder, target, training, stage, device="cpu", overwrite=True, restart=True)
    return measure(target)


def _line(rows: list[DemoRow]) -> str:
    joint, pruned = (next(row for row in rows if row.name == name) for name in HEALED)
    assert joint.plan is not None
    assert joint.after is not None
    assert joint.after.against is not None
    assert pruned.after is not None
    assert pruned.after.against is not None
    context = joint.plan.blueprint.arch.max_position_embeddings
    lost = {"pruned to the same size": pruned.after.against.difference}
    found = joint.after.against
    return report_line("relaxed", joint.plan, found.difference, found.difference_error, lost, context)


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")
