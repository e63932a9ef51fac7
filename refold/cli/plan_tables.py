"""Plans as tables."""

from collections.abc import Sequence
from typing import Any

from refold.cli.show import format_bytes, format_count, print_table
from refold.planning.lines import compare_memory
from refold.planning.plan import PlannedRecipe, StackPlan

LABELS = {
    "parameters": "parameters",
    "non_embedding_parameters": "without embedding and head",
    "weight_bytes": "weight bytes",
    "cache_bytes": "cache at {context:,} tokens",
    "flops": "FLOPs per token there",
}


def print_plan(made: StackPlan, context: int, lines: bool) -> None:
    """One plan: costs of source and target side by side, then notes."""
    rows = []
    for row in made.summary(context):
        form = format_bytes if row.quantity.endswith("bytes") else format_count
        ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
        rows.append((LABELS[row.quantity].format(context=context), form(row.source), form(row.target), ratio))
    memory = compare_memory(made.cost.source, made.cost.target)
    rows += (
        (
            f"cache + state at {each.context:,}",
            format_bytes(each.source),
            format_bytes(each.target),
            f"{each.target / each.source:.3f}" if each.source else "-",
        )
        for each in memory.cache_and_state
    )
    name = made.source.path or f"{made.source.id}@{made.source.revision}"
    print_table(("", "source", "target", "ratio"), rows, f"{name} ({made.source.model_type}, {made.source.dtype})")
    print(f"less memory than its source (weights, cache and state): {memory.describe()}")
    depths, blueprint = made.blueprint.num_depths, made.blueprint
    print(f"\n{depths} depths run {len(blueprint.mixers)} stored mixers and {len(blueprint.mlps)} stored MLPs")
    for said in made.notes:
        print(f"- {said}")
    if lines:
        print()
        table = [(line.tensors, line.how, str(line.count), _span(line.layers), line.reason) for line in made.lines]
        print_table(("tensors", "how", "count", "source layers", "why"), table)


def as_json(made: StackPlan) -> dict[str, Any]:
    """The plan as `convert` writes it, with what follows from its cost about memory."""
    memory = compare_memory(made.cost.source, made.cost.target)
    return {**made.model_dump(mode="json"), "memory": memory.model_dump(mode="json")}


def print_all(planned: Sequence[PlannedRecipe], context: int) -> None:
    """All built-in recipes side by side, the source first."""
    rows = []
    first = next((each.plan for each in planned if each.plan is not None), None)
    if first is not None:
        source = {row.quantity: row.source for row in first.summary(context)}
        rows.append(_row("source", source, source, "-", "no"))
    for each in planned:
        if each.plan is None:
            rows.append((each.name, each.error or "", "", "", "", "", "", ""))
            continue
        summary = each.plan.summary(context)
        target = {row.quantity: row.target for row in summary}
        source = {row.quantity: row.source for row in summary}
        memory = compare_memory(each.plan.cost.source, each.plan.cost.target)
        healing = "yes" if each.plan.needs_healing else "no"
        rows.append(_row(each.name, target, source, memory.describe(), healing))
    print_table(
        (
            "recipe",
            "parameters",
            "weight bytes",
            "of source",
            f"cache at {context:,}",
            "less memory",
            "FLOPs per token",
            "needs healing",
        ),
        rows,
    )


def _row(name: str, cost: dict[str, int], source: dict[str, int], less_memory: str, healing: str) -> tuple[str, ...]:
    share = cost["weight_bytes"] / source["weight_bytes"]
    return (
        name,
        format_count(cost["parameters"]),
        format_bytes(cost["weight_bytes"]),
        f"{share:.0%}",
        format_bytes(cost["cache_bytes"]),
        less_memory,
        format_count(cost["flops"]),
        healing,
    )


def _span(layers: Sequence[int]) -> str:
    """`0..5` for a run, `0,2,5` otherwise."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}..{layers[-1]}"
    return ",".join(map(str, layers))
