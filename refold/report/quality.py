"""Size against loss, and the figures of every evaluation on text."""

from collections.abc import Iterator, Sequence

from refold.report.axes import short_bytes
from refold.report.chart import ChartAxis, ChartText, PlotPoint, Series, draw_chart
from refold.report.drawing import Drawing
from refold.report.record import LossPoint, ReportRun, scale_of
from refold.report.section import ReportSection, ReportTable, count_of, file_name, titled, with_error


def size_and_loss(runs: Sequence[ReportRun]) -> ReportSection | None:
    """Makes the section with a picture of size and loss for each text."""
    by_scale: dict[str, list[LossPoint]] = {}
    for run in runs:
        for point in run.points:
            by_scale.setdefault(point.scale.key, []).append(_named(runs, run, point))
    if not by_scale:
        return None
    unique = [_unique(points) for points in by_scale.values()]
    drawings = tuple(_draw(points, number) for number, points in enumerate(unique))
    tables = (*map(_point_table, unique), *_evaluation_tables(runs))
    intro = (
        "Bytes of the stored weights against the loss on held-out text; the lower left is best. Bars are one standard "
        "error of the difference to the source, documents paired, where the source was scored on the same text."
    )
    return ReportSection("size-and-loss", "Size and loss", intro, drawings, tables)


def _named(runs: Sequence[ReportRun], run: ReportRun, point: LossPoint) -> LossPoint:
    # Sources of several runs stay apart by their own names, because runs may have different sources.
    place = run.source.rstrip("/").rpartition("/")[2]
    name = f"source {place}".strip() if point.is_source else titled(runs, run, point.name)
    series = point.series and titled(runs, run, point.series)
    return LossPoint(name, point.bytes, point.loss, point.error, point.scale, series, point.is_source)


def _unique(points: Sequence[LossPoint]) -> list[LossPoint]:
    return list({(each.name, each.bytes, each.loss): each for each in points}.values())


def _draw(points: Sequence[LossPoint], number: int) -> Drawing:
    scale = points[0].scale
    grouped: dict[tuple[str, bool], list[LossPoint]] = {}
    for point in points:
        grouped.setdefault((point.name if point.is_source else point.series or point.name, point.is_source), []).append(
            point
        )
    series = [
        Series(name, tuple(_plot(each) for each in sorted(group, key=lambda one: one.bytes)), len(group) > 1, is_source)
        for (name, is_source), group in grouped.items()
    ]
    text = ChartText(
        file_name("size-and-loss", *([str(number + 1)] if number else [])),
        f"Size and loss{f', text {number + 1}' if number else ''}",
        f"{count_of(len(points), 'model')} by the bytes of their weights and {scale.quantity} on {scale.text}.",
    )
    return draw_chart(text, ChartAxis("bytes of weights", short_bytes), ChartAxis(scale.quantity), series)


def _plot(point: LossPoint) -> PlotPoint:
    tip = f"{point.name}: {short_bytes(point.bytes)}, {with_error(point.loss, point.error)}"
    low, high = (None, None) if point.error is None else (point.loss - point.error, point.loss + point.error)
    return PlotPoint(point.bytes, point.loss, low, high, tip)


def _point_table(points: Sequence[LossPoint]) -> ReportTable:
    rows = tuple(
        (each.name, f"{each.bytes:,.0f}", with_error(each.loss, each.error, 4))
        for each in sorted(points, key=lambda one: one.bytes)
    )
    scale = points[0].scale
    return ReportTable(f"Size and loss on {scale.text}", ("model", "bytes", scale.quantity), rows)


def _evaluation_tables(runs: Sequence[ReportRun]) -> Iterator[ReportTable]:
    by_scale: dict[str, list[tuple[str, ...]]] = {}
    texts: dict[str, str] = {}
    for run in runs:
        for each in run.evaluations:
            scale, found = scale_of(each.found), each.found
            texts[scale.key] = f"{scale.text}: {found.documents:,} documents, {found.tokens:,} scored tokens"
            rows = by_scale.setdefault(scale.key, [])
            name = titled(runs, run, each.name)
            against = found.against
            rows.append(
                (
                    name,
                    with_error(found.bits_per_byte, found.bits_per_byte_error, 4),
                    "-" if against is None else with_error(against.difference, against.difference_error, 4),
                    f"{found.perplexity:.3f}",
                    f"{found.accuracy:.2%}",
                    "-" if against is None else f"{against.agreement:.2%}",
                    "-" if against is None else f"{against.kl:.4f}",
                )
            )
            for kind in found.kinds:
                difference = "-" if kind.difference is None else with_error(kind.difference, kind.difference_error, 4)
                rows.append(
                    (
                        f"{name} on {kind.name}",
                        with_error(kind.bits_per_byte, kind.bits_per_byte_error, 4),
                        difference,
                        f"{kind.perplexity:.3f}",
                        f"{kind.accuracy:.2%}",
                        "-" if kind.agreement is None else f"{kind.agreement:.2%}",
                        "-" if kind.kl is None else f"{kind.kl:.4f}",
                    )
                )
    head = ("model", "bits per byte", "to the source", "perplexity", "accuracy", "agreement", "KL")
    for key, rows in by_scale.items():
        yield ReportTable(texts[key], head, tuple(dict.fromkeys(rows)), is_closed=True)
