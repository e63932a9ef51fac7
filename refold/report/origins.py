"""Stacks as pictures and tables, memory by context, the transfer account, and provenance."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from refold.blueprint.cost import smaller_from
from refold.blueprint.schema import POOLS
from refold.blueprint.tensors import float_tensors
from refold.evaluation.result import Machine
from refold.planning.plan import Plan
from refold.report.axes import short_bytes, short_count
from refold.report.bars import Bar, BarRow, draw_bars
from refold.report.chart import ChartAxis, ChartText, PlotPoint, Series, draw_chart
from refold.report.record import MadeModel, ReportRun
from refold.report.section import ReportSection, ReportTable, count_of, file_name, titled
from refold.report.stack import describe_depth, describe_part, draw_stack

CONTEXTS = tuple(2**power for power in range(7, 18))
"""Lengths at which memory is drawn: 128 to 131,072 tokens."""
ACCOUNTS = {
    "copied": "carried",
    "split": "carried",
    "repeated": "carried",
    "averaged": "averaged",
    "factorised": "fitted",
    "joint": "fitted",
    "mapped": "fitted",
    "fresh": "fresh",
    "dropped": "dropped",
    "ignored": "dropped",
}
"""The account of each kind of line of a plan."""
MOST_LINES = 24
"""Lines up to which the table of tensors is open."""


def _models(runs: Sequence[ReportRun]) -> list[tuple[str, MadeModel]]:
    return [(titled(runs, run, model.name), model) for run in runs for model in run.models]


def stacks(runs: Sequence[ReportRun]) -> ReportSection | None:
    """Makes the section with the picture of each stack."""
    drawings, tables = [], []
    for name, model in _models(runs):
        blueprint = model.blueprint
        about = (
            f"{blueprint.arch.num_layers} source layers, {len(blueprint.mixers)} stored mixers, "
            f"{len(blueprint.mlps)} stored MLPs and {blueprint.num_depths} depths; the table names the parts of each."
        )
        text = ChartText(file_name("stack", name), f"{name}: stack", about)
        drawings.append(draw_stack(text, blueprint, blueprint.arch.num_layers))
        tables.append(_depth_table(name, model))
        tables.append(_cost_table(name, model))
    if not drawings:
        return None
    intro = (
        "Source layers at the edges, stored parts between, depths in the middle in the order of execution. A coloured "
        "line joins a stored part that several depths run (a tie). A dashed layer is not read, a dashed depth is "
        "dropped. A thick bar below a depth is an exit; a coloured edge is another mixer than the source's attention."
    )
    return ReportSection("stack", "Stack", intro, tuple(drawings), tuple(tables))


def _depth_table(name: str, model: MadeModel) -> ReportTable:
    rows = []
    for index, depth in enumerate(model.blueprint.depths):
        parts = []
        for pool in POOLS:
            used = getattr(depth, pool)
            if used is None:
                parts.append("none")
            else:
                title, form = describe_part(model.blueprint, pool, used)
                parts.append(f"{title}, {form}" if form else title)
        rows.append((str(index), str(depth.source), *parts, ", ".join(describe_depth(depth)) or "-"))
    head = ("depth", "source layer", "mixer", "MLP", "of its own")
    return ReportTable(f"{name}: depths", head, tuple(rows), is_closed=True)


def _cost_table(name: str, model: MadeModel) -> ReportTable:
    context = model.blueprint.arch.max_position_embeddings
    source, target = model.cost.source, model.cost.target
    quantities = (
        ("parameters", source.parameters, target.parameters),
        ("non-embedding parameters", source.non_embedding_parameters, target.non_embedding_parameters),
        ("weight bytes", source.weight_bytes, target.weight_bytes),
        (f"cache bytes at {context:,} tokens", source.cache_bytes(context), target.cache_bytes(context)),
        (f"FLOPs of a token at {context:,} tokens", source.flops(context), target.flops(context)),
    )
    rows = tuple(
        (title, f"{before:,}", f"{after:,}", f"{after / before:.1%}" if before else "-")
        for title, before, after in quantities
    )
    return ReportTable(f"{name}: costs", ("quantity", "source", "model", "share"), rows)


def memory(runs: Sequence[ReportRun]) -> ReportSection | None:
    """Makes the section on the memory of weights, cache and state by length of the context."""
    series: dict[tuple[str, tuple[PlotPoint, ...]], Series] = {}
    rows = []
    for run in runs:
        for model in run.models:
            place = run.source.rstrip("/").rpartition("/")[2]
            both = ((f"source {place}".strip(), model.cost.source), (titled(runs, run, model.name), model.cost.target))
            for name, costs in both if both[0][1] != both[1][1] else both[1:]:
                points = tuple(PlotPoint(float(each), float(costs.memory_bytes(each))) for each in CONTEXTS)
                new = Series(name, points, is_source=costs is model.cost.source)
                if (name, points) not in series:
                    series[name, points] = new
                    rows.append((name, *(f"{costs.memory_bytes(each):,}" for each in CONTEXTS[1::3])))
    if not series:
        return None
    models = count_of(len(series), "model")
    about = f"Bytes of weights, cache and state of one sequence for {models} by length of the context."
    text = ChartText("memory", "Memory by context", about)
    drawing = draw_chart(
        text,
        ChartAxis("tokens of context", short_count, is_log=True),
        ChartAxis("bytes of weights, cache and state", short_bytes),
        list(series.values()),
    )
    head = ("model", *(f"{each:,} tokens" for each in CONTEXTS[1::3]))
    table = ReportTable("Bytes of weights, cache and state", head, tuple(rows))
    folded = [(name, model) for name, model in _models(runs) if model.cost.source != model.cost.target]
    said = [f"{name} needs less memory than its source {_from(model)}." for name, model in folded]
    intro = "Computed from the cost model, for one sequence. " + " ".join(said)
    return ReportSection("memory", "Memory by context", intro, (drawing,), (table,))


def _from(model: MadeModel) -> str:
    first = smaller_from(model.cost.source, model.cost.target)
    if first is None:
        return "at no length"
    return f"from {first:,} tokens on" if first else "at every length"


def transfer(runs: Sequence[ReportRun]) -> ReportSection | None:
    """Makes the section on the transfer account: carried, averaged, fitted, fresh and dropped tensors."""
    planned = [(name, model.plan) for name, model in _models(runs) if model.plan is not None]
    if not planned:
        return None
    drawings, tables = [], []
    for name, plan in planned:
        numbers = account(plan)
        rows = [BarRow(title, (Bar(float(number)),)) for title, number in numbers.items()]
        about = (
            f"Parameters of the model by their origin: {', '.join(f'{title} {n:,}' for title, n in numbers.items())}."
        )
        text = ChartText(file_name("transfer", name), f"{name}: parameters by origin", about)
        drawings.append(draw_bars(text, "parameters at conversion", ("parameters",), rows, short_count))
        head = ("tensors", "account", "how", "number", "source layers", "reason")
        lines = tuple(
            (line.tensors, ACCOUNTS[line.how], line.how, str(line.count), _layers(line.layers), line.reason or "-")
            for line in plan.lines
        )
        tables.append(ReportTable(f"{name}: tensors", head, lines, is_closed=len(lines) > MOST_LINES))
    intro = (
        "Origin of each tensor at conversion. Carried: a copy of one source tensor; averaged: a mean over tied layers; "
        "fitted: a factorisation, a joint fit or a map; fresh: initialised; dropped: a source tensor without a place."
    )
    return ReportSection("transfer", "Transfer account", intro, tuple(drawings), tuple(tables))


def account(plan: Plan) -> dict[str, int]:
    """Returns the number of parameters of a plan's model by account, quantised weights as whole numbers."""
    found: Counter[str] = Counter()
    for tensor in float_tensors(plan.blueprint):
        found[ACCOUNTS[tensor.origin(plan.blueprint, plan.starts).how]] += tensor.num_elements
    order = dict.fromkeys(ACCOUNTS.values())
    return {name: found[name] for name in order if found[name]}


def _layers(layers: Sequence[int]) -> str:
    """Writes layer numbers with runs joined: `0-3, 7`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "-"


def history(runs: Sequence[ReportRun]) -> ReportSection | None:
    """Makes the section on provenance: stages, commands, machines and versions."""
    tables, commands = [], list(_commands(runs))
    for name, model in _models(runs):
        rows = tuple(
            (
                stage.stage,
                stage.time,
                "-" if stage.seed is None else str(stage.seed),
                f"{stage.tokens:,}" if stage.tokens else "-",
                ", ".join(stage.text) or "-",
                _versions(stage.versions),
            )
            for stage in model.stages
        )
        head = ("stage", "time", "seed", "tokens", "text", "versions")
        tables += [ReportTable(f"{name}: stages", head, rows)] if rows else []
        recipe = _recipe(next((stage.recipe for stage in model.stages if stage.recipe), {}))
        tables += [ReportTable(f"{name}: recipe", ("key", "value"), recipe, is_closed=True)] if recipe else []
    measured = tuple(dict.fromkeys(_measured(runs)))
    if measured:
        tables.append(ReportTable("Measurements", ("of", "time", "machine", "versions"), measured))
    if commands:
        tables.append(ReportTable("Commands", ("of", "command"), tuple(commands)))
    if not tables:
        return None
    intro = "Stages that made each model, and the machines and versions of the measurements."
    return ReportSection("provenance", "Provenance", intro, (), tuple(tables))


def _recipe(recipe: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    return tuple((key, json.dumps(value)) for key, value in recipe.items() if value not in (None, [], {}, ""))


def _measured(runs: Sequence[ReportRun]) -> Iterator[tuple[str, ...]]:
    for run in runs:
        of_cards = {id(card.found.text) for card in run.scorecards}
        for each in run.evaluations:
            if id(each.found) not in of_cards:
                found = each.found
                yield titled(runs, run, each.name), found.time, _machine(found.machine), _versions(found.versions)
        for card in run.scorecards:
            found = card.found
            name = titled(runs, run, card.name)
            yield name, found.time, _machine(found.machine), _versions(found.versions)


def _commands(runs: Sequence[ReportRun]) -> Iterator[tuple[str, str]]:
    """Yields every command once, with the things that it made."""
    made: dict[str, list[str]] = {}
    for name, model in _models(runs):
        for stage in model.stages:
            made.setdefault(stage.command, []).append(f"{name}: {stage.stage}")
    for run in runs:
        for card in run.scorecards:
            made.setdefault(card.found.command, []).append(f"{titled(runs, run, card.name)}: evaluate")
    yield from ((", ".join(names), command) for command, names in made.items() if command)


def _machine(machine: Machine) -> str:
    place = f"{machine.device} ({machine.device_name}), {machine.system}"
    return f"{place}, {machine.cpus} CPUs, {machine.torch_threads} threads"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{package} {number}" for package, number in versions.items())
