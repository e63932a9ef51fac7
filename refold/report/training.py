"""Loss by tokens of healing, one picture for each stage, and held-out text while it was trained."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from refold.report.axes import short_count
from refold.report.chart import ChartAxis, ChartText, PlotPoint, Series, draw_chart
from refold.report.drawing import Drawing
from refold.report.record import ReportRun
from refold.report.section import ReportSection, ReportTable, file_name, titled

MOST_POINTS = 60
"""Points of a curve; of a longer log each point is a mean over steps."""
StepLines = Sequence[dict[str, Any]]


def healing(runs: Sequence[ReportRun]) -> ReportSection | None:
    """Makes the section with loss curves of healing."""
    logs = [(titled(runs, run, log.name), log.steps) for run in runs for log in run.logs]
    if not logs:
        return None
    last = max(int(step["stage"]) for _, steps in logs for step in steps)
    drawings = []
    for stage in range(1, last + 1):
        of_stage = [(name, [step for step in steps if step["stage"] == stage]) for name, steps in logs]
        drawings += _draw(of_stage, stage, "loss", "training loss, nats per token")
        drawings += _draw(of_stage, stage, "held_out", "held-out text, bits per byte")
    intro = (
        "Each stage by itself. The training loss is that of the stage's objective (cross-entropy, divergence from the "
        "source, distance of activations), so that only curves of one objective can be compared."
    )
    return ReportSection("healing", "Healing", intro, tuple(drawings), (_table(logs),))


def _draw(logs: Sequence[tuple[str, StepLines]], stage: int, key: str, title: str) -> Iterator[Drawing]:
    series = [Series(name, curve(steps, key)) for name, steps in logs if curve(steps, key)]
    if not series:
        return
    about = (
        f"{title} by tokens of healing for {', '.join(each.name for each in series)}; the table has the last values."
    )
    heading = "Training loss" if key == "loss" else "Held-out text while healing"
    text = ChartText(file_name(heading, f"stage-{stage}"), f"{heading}, stage {stage}", about)
    yield draw_chart(text, ChartAxis("tokens of healing", short_count, is_log=False), ChartAxis(title), series)


def curve(steps: StepLines, key: str) -> tuple[PlotPoint, ...]:
    """Returns a quantity by tokens; steps whose value is missing or not finite are passed over."""
    found = [(step["tokens"], step[key]) for step in steps if _is_number(step.get(key))]
    size = -(-len(found) // MOST_POINTS)
    groups = [found[start : start + size] for start in range(0, len(found), size)] if found else []
    return tuple(
        PlotPoint(float(group[-1][0]), math.fsum(value for _, value in group) / len(group)) for group in groups
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _table(logs: Sequence[tuple[str, StepLines]]) -> ReportTable:
    rows = []
    for name, steps in logs:
        for stage in sorted({int(step["stage"]) for step in steps}):
            inside = [step for step in steps if step["stage"] == stage]
            first, last = inside[0], inside[-1]
            held_out = [step["held_out"] for step in inside if _is_number(step.get("held_out"))]
            rows.append(
                (
                    f"{name}, stage {stage}",
                    f"{len(inside):,}",
                    f"{last['tokens']:,}",
                    _written(first["loss"]),
                    _written(last["loss"]),
                    f"{max(step['learning_rate'] for step in inside):g}",
                    str(sum(bool(step.get("skipped")) for step in inside)),
                    f"{held_out[-1]:.4f}" if held_out else "-",
                )
            )
    head = ("model", "steps", "tokens", "first loss", "last loss", "highest rate", "skipped", "held out")
    return ReportTable("Stages of healing", head, tuple(rows))


def _written(value: Any) -> str:
    return f"{value:.4f}" if _is_number(value) else "-"
