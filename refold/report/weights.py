"""Energy kept by linears, spectra of ties, distances between layers and their influence."""

import statistics
from collections.abc import Mapping, Sequence

from refold.report.axes import plain
from refold.report.chart import ChartAxis, ChartText, PlotPoint, Series, draw_chart
from refold.report.drawing import Drawing
from refold.report.heat_map import HeatTable, draw_heat_map, symmetric
from refold.report.record import ReportRun
from refold.report.section import ReportSection, ReportTable, file_name, titled
from refold.sources.measurements import Influence, Measurements

LORAS = "LoRAs"


def energy(runs: Sequence[ReportRun]) -> ReportSection | None:
    """Makes the section on the energy that low-rank forms keep, and on the spectra of ties."""
    drawings: list[Drawing] = []
    tables: list[ReportTable] = []
    for run in runs:
        for model in run.models:
            plan, name = model.plan, titled(runs, run, model.name)
            for form, kept in () if plan is None else _kept(plan.kept_energy, plan.factor_energy):
                drawings += _energy_map(name, form, kept)
                tables.append(_energy_table(name, form, kept))
            if plan is not None and plan.approximation:
                rows = tuple(
                    (place, f"{each.start:.4f}", "-" if each.fitted is None else f"{each.fitted:.4f}", each.inputs)
                    for place, each in plan.approximation.items()
                )
                head = ("depth", "before the fit", "fitted", "inputs")
                tables.append(ReportTable(f"{name}: distance of attention from the source's", head, rows))
        if run.measurements is not None and run.measurements.spectra:
            drawings.append(_spectra(run.name, run.measurements))
    if not drawings and not tables:
        return None
    intro = (
        "LoRAs: the share of the energy of a residual (source weight minus stored weight, in the recipe's error metric"
        ") that the LoRA of a depth restored at conversion. Factors: the share of a weight's energy that the stored "
        "factors hold. Spectra: the share of a tie's loss that LoRAs of a rank would keep."
    )
    return ReportSection("energy", "Energy kept by linear", intro, tuple(drawings), tuple(tables))


def _kept(loras: Mapping[str, float], factors: Mapping[str, float]) -> list[tuple[str, Mapping[str, float]]]:
    found = ((LORAS, loras), ("factors", factors))
    return [(name, kept) for name, kept in found if kept]


def _places(kept: Mapping[str, float]) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Returns rows, columns and values of `depths.3.q_proj` or `mlps.0.up_proj`; parts of both pools share a row."""
    values = {}
    for name, value in kept.items():
        pool, number, linear = name.split(".", 2)
        values[f"{'depth' if pool == 'depths' else 'part'} {number}", linear] = value
    rows = sorted({row for row, _ in values}, key=lambda row: int(row.rpartition(" ")[2]))
    return rows, list(dict.fromkeys(linear for _, linear in values)), values


def _energy_map(name: str, form: str, kept: Mapping[str, float]) -> list[Drawing]:
    rows, linears, values = _places(kept)
    if len(values) < 2:
        return []
    table = HeatTable(
        rows=tuple(linears),
        columns=tuple(row.rpartition(" ")[2] for row in rows),
        values=tuple(tuple(values.get((row, linear)) for row in rows) for linear in linears),
        quantity="share of energy kept",
        across="depth" if form == LORAS else "stored part",
    )
    about = f"{len(values)} shares by linear and {table.across}; the table has the mean of each linear."
    return [draw_heat_map(ChartText(file_name("energy", form, name), f"{name}: energy kept by {form}", about), table)]


def _energy_table(name: str, form: str, kept: Mapping[str, float]) -> ReportTable:
    _, linears, values = _places(kept)
    rows = []
    for linear in linears:
        found = [value for (_, each), value in values.items() if each == linear]
        rows.append(
            (linear, str(len(found)), f"{statistics.fmean(found):.4f}", f"{min(found):.4f}", f"{max(found):.4f}")
        )
    return ReportTable(f"{name}: energy kept by {form}", ("linear", "number", "mean", "least", "most"), tuple(rows))


def _spectra(name: str, found: Measurements) -> Drawing:
    series = []
    for spectra in found.spectra:
        lost = [each.lost for each in spectra.linears.values()]
        total = sum(lost) or 1.0
        points = tuple(
            PlotPoint(share, sum(each.lost * each.kept[place] for each in spectra.linears.values()) / total)
            for place, share in enumerate(spectra.shares)
        )
        series.append(Series(f"{spectra.pattern}, {spectra.loops} loops: loses {statistics.fmean(lost):.0%}", points))
    about = f"Share of the loss by tying that LoRAs keep, by their rank, for {len(series)} ways to tie."
    text = ChartText(file_name("spectra", name), f"{name}: kept by LoRAs of each rank", about)
    across = ChartAxis("LoRA rank as a share of the full rank", plain, is_log=True)
    return draw_chart(text, across, ChartAxis("kept share of the loss by tying", is_log=False), series)


def similarity(runs: Sequence[ReportRun]) -> ReportSection | None:
    """Makes the section on the similarity and the influence of layers."""
    drawings: list[Drawing] = []
    tables: list[ReportTable] = []
    for run in runs:
        found = run.measurements
        if found is not None:
            drawings += _distances(run.name, found)
            tables.append(_influence_table(run.name, found.influence))
            drawings.append(_influence(run.name, found.influence))
        for model in run.models:
            if model.plan is not None and model.plan.influence is not None:
                name = titled(runs, run, model.name)
                drawings.append(_influence(name, model.plan.influence))
                tables.append(_influence_table(name, model.plan.influence))
    if not drawings:
        return None
    intro = (
        "Distances of weights: |A - B| / sqrt(|A|² + |B|²), mean over linears, 0 for equal layers and 1 for layers "
        "that have nothing in common. Distances of streams: the angle between residual streams before two layers, as a "
        "share of π. Influence: one minus the cosine similarity of the stream before and after a layer or a part."
    )
    return ReportSection("similarity", "Similarity of layers", intro, tuple(drawings), tuple(tables))


def _distances(name: str, found: Measurements) -> list[Drawing]:
    weights = list(found.similarity.weights.values())
    size = len(weights[0])
    mean = [
        [statistics.fmean(table[row][column] for table in weights) for column in range(size)] for row in range(size)
    ]
    kinds = (("weights", mean, "relative distance"), ("streams", found.similarity.streams, "angular distance (of π)"))
    drawn = []
    for kind, values, quantity in kinds:
        if len(values) < 2:
            continue
        layers = tuple(map(str, range(len(values))))
        text = ChartText(
            file_name("distance-of", kind, name),
            f"{name}: distance of {kind}",
            f"Distances between {len(values)} layers; dark cells are pairs that are alike.",
        )
        table = HeatTable(layers, layers, symmetric(values), quantity, across="layer")
        drawn.append(draw_heat_map(text, table))
    return drawn


def _influence(name: str, found: Influence) -> Drawing:
    kinds = (("block", found.block), ("attention", found.attention), ("MLP", found.mlp))
    series = [
        Series(kind, tuple(PlotPoint(float(layer), value) for layer, value in enumerate(values)))
        for kind, values in kinds
        if values
    ]
    about = f"Influence of {len(found.block)} layers, their attention and their MLPs; the table has the figures."
    text = ChartText(file_name("influence", name), f"{name}: influence of layers", about)
    return draw_chart(text, ChartAxis("layer", is_log=False), ChartAxis("influence: 1 − cosine similarity"), series)


def _influence_table(name: str, found: Influence) -> ReportTable:
    rows = tuple(
        (str(layer), *(f"{value:.4f}" for value in values))
        for layer, values in enumerate(zip(found.block, found.attention, found.mlp, strict=True))
    )
    return ReportTable(f"{name}: influence by layer", ("layer", "block", "attention", "MLP"), rows, is_closed=True)
