"""A finished fit folder as a part of a report."""

from pathlib import Path

from refold.errors import FolderError
from refold.fitting.report import REPORT_NAME, CostFigures, FitCandidate, FitReport, read_report
from refold.fitting.workspace import FIT_NAME, MODEL_NAME
from refold.report.opening import RunKind, read_heal_log, read_model
from refold.report.record import LossPoint, LossScale, ReportRun
from refold.scorecard.pairing import Difference, average


def read_fit_folder(root: Path) -> ReportRun:
    """Reads a folder of `refold fit`: its points and single methods, and its model if it has one.

    Raises:
        FolderError: The fit is unfinished or damaged, or of a newer version.
    """
    if not (root / REPORT_NAME).exists():
        raise FolderError(f"{root}: a finished fit is required ({REPORT_NAME} is missing); repeat its command to go on")
    found, folder = read_report(root / REPORT_NAME), root / MODEL_NAME
    models = (read_model(folder, "fit"),) if folder.is_dir() else ()
    facts = [("budget", point.budget.text) for point in found.points]
    facts += [("calibration text", f"{each.tokens:,} tokens of {each.name}") for each in found.text]
    facts += [("engine", found.engine)] if found.engine else []
    facts += [("seconds", ", ".join(f"{name} {value:.0f}" for name, value in found.seconds.items()))]
    return ReportRun(
        name=root.absolute().name,
        kind="fit",
        path=root,
        source=found.source,
        line="; ".join(point.summary for point in found.points[:1]),
        facts=tuple(facts),
        notes=found.notes,
        models=models,
        points=fit_points(found),
        logs=read_heal_log(folder, "fit") if models else (),
    )


def fit_points(found: FitReport) -> tuple[LossPoint, ...]:
    """Returns size and loss over the source of the source, of every single method and of the chosen models."""
    names = ", ".join(f"{each.name} ({each.tokens:,} tokens)" for each in found.held_out)
    key = repr([(each.name, each.tokens, each.loss) for each in found.held_out])
    scale = LossScale("nats per token over the source", names or "no held-out text (predicted)", key)
    points = [LossPoint("source", found.source_costs.bytes, 0.0, None, scale, "source", is_source=True)]
    for point, budget in zip(found.points, found.budget_names, strict=True):
        for single in point.singles:
            if single.made is not None:
                points += _point(single.made, f"{single.name} at {budget}", single.name, scale)
        points += _point(point, f"fit at {budget}", "this fit", scale)
    return tuple(points)


def _point(made: FitCandidate, name: str, series: str, scale: LossScale) -> list[LossPoint]:
    if made.loss is None:
        return []
    # Texts are independent of each other.
    losses = [Difference(each.loss, each.error) for each in made.losses.values()]
    costs: CostFigures = made.costs
    return [LossPoint(name, costs.bytes, made.loss, average(losses).error if losses else None, scale, series)]


FIT_FOLDER = RunKind("`refold fit`", FIT_NAME, read_fit_folder)
