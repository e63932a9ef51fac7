"""Tables of plans, and of the approximation that a conversion measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from refold.blueprint.cost import Cost
from refold.blueprint.floor import find_floor
from refold.cli.show import format_bytes, format_count, print_table, print_text
from refold.families.arch import ArchSpec
from refold.planning.approximation import Approximation
from refold.planning.build import identity_blueprint
from refold.planning.lines import MemoryNeeds, compare_memory
from refold.planning.plan import PlannedRecipe, StackPlan

LABELS = {
    "parameters": "parameters",
    "non_embedding_parameters": "without embedding and head",
    "weight_bytes": "weight bytes",
    "cache_bytes": "cache at {context:,} tokens",
    "flops": "FLOPs per token at {context:,}",
}

TEXT = {"required": "yes", "useful": "helps", "unused": "-"}
SMALL_SHARE = 1.2
"""Ratio of all parameters to those without embedding and head from which a line about the embedding is printed."""


def print_plan(made: StackPlan, context: int, lines: bool) -> None:
    """Prints one plan: costs of source and target side by side, then notes."""
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
    print_text(f"less memory than its source (weights, cache and state): {memory.describe()}")
    depths, blueprint = made.blueprint.num_depths, made.blueprint
    print(f"\n{depths} depths run {len(blueprint.mixers)} stored mixers and {len(blueprint.mlps)} stored MLPs")
    if made.cost.source.parameters > SMALL_SHARE * made.cost.source.non_embedding_parameters:
        print_text(_floor(made.blueprint.arch), "- ")
    for said in made.notes:
        print_text(said.text, "- ")
    if lines:
        print()
        table = [(line.tensors, line.how, str(line.count), _span(line.layers), line.reason) for line in made.lines]
        print_table(("tensors", "how", "count", "source layers", "why"), table)


def print_approximation(found: Mapping[str, Approximation]) -> None:
    """Prints how far the feature maps of each depth are from softmax attention, if there are feature maps."""
    if not found:
        return
    first = next(iter(found.values()))
    on = "held-out text" if first.inputs == "text" else "random inputs"
    rows = [
        (
            name.removeprefix("depths."),
            f"{each.start:.3f}",
            _number(each.fitted),
            f"{each.start_gap:.3f}",
            _number(each.fitted_gap),
        )
        for name, each in found.items()
    ]
    print()
    print_table(
        ("depth", "attention misplaced", "fitted", "cross-entropy gap (nats)", "fitted"),
        rows,
        f"softmax attention by feature maps, at conversion, on {first.tokens:,} tokens of {on}",
    )


def as_json(made: StackPlan) -> dict[str, Any]:
    """Returns the plan as `convert` writes it, with its needs of memory."""
    memory = compare_memory(made.cost.source, made.cost.target)
    return {**made.model_dump(mode="json"), "memory": memory.model_dump(mode="json")}


def print_all(planned: Sequence[PlannedRecipe], context: int) -> None:
    """Prints all built-in recipes side by side, the source first, then by weight bytes."""
    plans = {each.name: each.plan for each in planned if each.plan is not None}
    if plans:
        source = next(iter(plans.values())).cost.source
        rows = [("source", *_costs(source, source, context), "-", "-")]
        for name, made in sorted(plans.items(), key=lambda item: item[1].cost.target.weight_bytes):
            memory = compare_memory(made.cost.source, made.cost.target)
            rows.append(
                (name, *_costs(made.cost.target, source, context), _less_memory(memory), TEXT[made.calibration])
            )
        columns = ("recipe", "bytes", "of source", f"cache at {context:,}", "FLOPs per token", "less memory", "text")
        print_table(columns, rows)
        print()
        print_text(_floor(next(iter(plans.values())).blueprint.arch))
        print_text("less memory: context from which weights, cache and state together take less than the source's")
        print_text("text: `yes` requires calibration text (--calibration), `helps` is better with some")
        print_text(_healing(plans))
    for each in planned:
        if each.plan is None:
            print_text(f"{each.name} does not fit: {each.error}", "- ")


def _costs(cost: Cost, source: Cost, context: int) -> tuple[str, ...]:
    return (
        format_bytes(cost.weight_bytes),
        f"{cost.weight_bytes / source.weight_bytes:.0%}",
        format_bytes(cost.cache_bytes(context)),
        format_count(cost.flops(context)),
    )


def _less_memory(memory: MemoryNeeds) -> str:
    if memory.smaller_from is None:
        return "never"
    return f"from {memory.smaller_from:,}" if memory.smaller_from else "always"


def _floor(arch: ArchSpec) -> str:
    """Returns the line about the bytes that no change of the layers lowers, and the share of embedding and head."""
    floor = find_floor(identity_blueprint(arch))
    integers = ", ".join(f"{format_bytes(count)} as {name}" for name, count in floor.outer_bytes.items())
    return (
        f"floor of the bytes: embedding and head are {floor.outer_share:.0%} of the source's parameters "
        f"({format_count(floor.outer_parameters)}): no fold, rank or drop makes them smaller, integers do "
        f"({integers}); norms and biases stay floats ({format_bytes(floor.kept_bytes)})"
    )


def _healing(plans: Mapping[str, StackPlan]) -> str:
    exact = ", ".join(name for name, made in plans.items() if not made.needs_healing)
    which = f"all but {exact}" if exact else "all of them"
    return f"{which} need healing (`refold heal`) before they are of use"


def _span(layers: Sequence[int]) -> str:
    """Returns numbers as `0..5` if they are consecutive, else as `0,2,5`."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}..{layers[-1]}"
    return ",".join(map(str, layers))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
