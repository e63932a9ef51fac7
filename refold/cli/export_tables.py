"""Tables of export targets and how they hold a model."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from refold.blueprint.cost import count_parameters
from refold.blueprint.schema import Blueprint
from refold.cli.show import format_bytes, print_table, print_text
from refold.exporting.target import ExportOptions, ExportTarget, Verdict

if TYPE_CHECKING:
    from refold.exporting.export import SurveyedTarget

WORDS = {"kept": "yes, size kept", "larger": "yes, larger", "impossible": "no"}


def print_survey(found: "Sequence[SurveyedTarget]") -> None:
    """Prints one row for each target, then the reasons and the changes that would mend them."""
    rows = [
        (
            each.target.name,
            ", ".join(each.target.engines),
            WORDS[each.verdict.status],
            "-" if each.num_bytes is None else format_bytes(each.num_bytes),
            "-" if each.share is None else f"{each.share:.2f}",
        )
        for each in found
    ]
    print_table(("--to", "engines", "holds it", "bytes", "ratio"), rows)
    for each in found:
        _print_verdict(each.target.name, each.verdict)


def print_held(blueprints: Mapping[str, Blueprint], targets: Sequence[ExportTarget]) -> None:
    """Prints how targets hold the results of recipes, which are given by the recipes' names; nothing without targets.

    The ratio is the number of exported 16-bit bytes divided by those of the folded model. Of several recipes only the
    smallest target that holds each one is shown, without reasons.
    """
    if not targets:
        return
    rows, verdicts = [], []
    for name, blueprint in blueprints.items():
        held = [(target, target.judge(blueprint)) for target in targets]
        if len(blueprints) > 1:
            held = [min(held, key=lambda each: _ratio(each[0], blueprint, each[1]))]
        for target, verdict in held:
            ratio = _ratio(target, blueprint, verdict)
            shown = "-" if math.isinf(ratio) else f"{ratio:.2f}"
            rows.append((name, target.name, WORDS[verdict.status], shown))
            verdicts.append((f"{name}, {target.name}", verdict))
    print()
    print_table(("recipe", "--to", "holds it", "ratio"), rows)
    if len(blueprints) > 1:
        print_text("with --recipe NAME the reasons and all formats of the engine are shown")
        return
    for name, verdict in verdicts:
        _print_verdict(name, verdict)


def held_json(blueprint: Blueprint, targets: Sequence[ExportTarget]) -> dict[str, Any]:
    """Returns the verdict of each target as plain data, by the target's name."""
    return {target.name: _verdict_json(target.judge(blueprint)) for target in targets}


def _ratio(target: ExportTarget, blueprint: Blueprint, verdict: Verdict) -> float:
    if verdict.status == "impossible":
        return math.inf
    own = 2 * count_parameters(blueprint).total
    return target.count_bytes(blueprint, ExportOptions(dtype="bfloat16")) / own


def _print_verdict(name: str, verdict: Verdict) -> None:
    """Prints the reasons of a verdict, and the recipe with which the target would hold the model."""
    for reason in verdict.reasons:
        print_text(f"{name}: {reason}", "- ")
    if verdict.changes:
        print_text(f"{name} needs in the recipe: {', '.join(verdict.changes)}", "- ")


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    return {"status": verdict.status, "reasons": list(verdict.reasons), "changes": list(verdict.changes)}


def as_json(found: "Sequence[SurveyedTarget]") -> list[dict[str, Any]]:
    """Returns the survey as plain data."""
    return [
        {
            "to": each.target.name,
            "engines": list(each.target.engines),
            "summary": each.target.summary,
            "quantisations": list(each.target.quantisations),
            **_verdict_json(each.verdict),
            "bytes": each.num_bytes,
            "share": each.share,
        }
        for each in found
    ]
