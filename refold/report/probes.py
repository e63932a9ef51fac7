"""Sections from scorecards: exits, recall, tasks, noise, branches, and sections that could not run."""

from collections.abc import Iterator, Mapping, Sequence

from refold.evaluation.result import ExitScores
from refold.report.axes import plain, short_count
from refold.report.bars import Bar, BarRow, draw_bars
from refold.report.chart import ChartAxis, ChartText, PlotPoint, Series, draw_chart
from refold.report.drawing import Drawing
from refold.report.record import ReportRun
from refold.report.section import ReportSection, ReportTable, count_of, file_name, titled, with_error
from refold.scorecard.pairing import Difference, average
from refold.scorecard.record import BranchScore, ExitSection, NoiseScore, RecallScore, Scorecard, TaskScore


def _cards(runs: Sequence[ReportRun]) -> list[tuple[str, Scorecard]]:
    # Several files of one model are told apart by the names of their files.
    named = [(each.name, run.name, each.found) for run in runs for each in run.scorecards]
    names = [name for name, _, _ in named]
    return [(f"{name} ({run})" if names.count(name) > 1 else name, card) for name, run, card in named]


EXIT_RULES: Mapping[str, tuple[str, ...]] = {
    "one exit for all": ("exit after", "full depth"),
    "oracle": ("oracle",),
    "thresholds": ("thresholds",),
    "calibrated": ("calibrated",),
}
"""First words of the rules for leaving that one series of the picture joins."""


def exits(runs: Sequence[ReportRun]) -> ReportSection | None:
    """Makes the section on early exits: quality by the depths that a token runs."""
    series: list[Series] = []
    tables: list[ReportTable] = []
    for run in runs:
        for each in run.evaluations:
            if each.found.exits:
                name = titled(runs, run, each.name)
                points = tuple(PlotPoint(float(score.depths), score.bits_per_byte) for score in each.found.exits)
                series.append(Series(f"{name}, every exit", points))
                tables.append(_exit_table(name, each.found.exits))
    for name, card in _cards(runs):
        if card.exits is not None and card.exits.choices:
            series += _rule_series(name, card.exits)
            tables.append(_rule_table(name, card.exits))
    if not series:
        return None
    about = "Bits per byte by the mean number of depths that a token runs; the tables have the figures."
    text = ChartText("exits", "Quality by exit", about)
    drawing = draw_chart(text, ChartAxis("depths run for a token", is_log=False), ChartAxis("bits per byte"), series)
    intro = "Bits per byte of the predictions at each exit, and of rules that choose an exit for each token."
    return ReportSection("exits", "Quality by exit", intro, (drawing,), tuple(tables))


def _exit_table(name: str, scores: Sequence[ExitScores]) -> ReportTable:
    head = ("exit", "bits per byte", "perplexity", "accuracy", "agreement", "KL", "gate accuracy")
    rows = tuple(
        (
            f"after {score.depths}",
            f"{score.bits_per_byte:.4f}",
            f"{score.perplexity:.3f}",
            f"{score.accuracy:.2%}",
            f"{score.agreement:.2%}",
            f"{score.kl:.4f}",
            "-" if score.gate_accuracy is None else f"{score.gate_accuracy:.2%}",
        )
        for score in scores
    )
    return ReportTable(f"{name}: all tokens at one exit", head, rows)


def _rule_series(name: str, section: ExitSection) -> Iterator[Series]:
    ordered = sorted(section.choices, key=lambda choice: choice.mean_depths)
    for title, words in EXIT_RULES.items():
        points = tuple(
            PlotPoint(each.mean_depths, each.bits_per_byte, tip=f"{each.rule}: {each.bits_per_byte:.4f}")
            for each in ordered
            if each.rule.startswith(words)
        )
        if points:
            yield Series(f"{name}, {title}", points)


def _rule_table(name: str, section: ExitSection) -> ReportTable:
    rows = tuple(
        (
            each.rule,
            f"{each.mean_depths:.2f} of {section.num_depths}",
            f"{each.bits_per_byte:.4f}",
            f"{each.agreement:.2%}",
            f"{each.accuracy:.2%}",
        )
        for each in sorted(section.choices, key=lambda choice: choice.mean_depths)
    )
    return ReportTable(f"{name}: rules for leaving", ("rule", "depths", "bits per byte", "agreement", "accuracy"), rows)


def recall(runs: Sequence[ReportRun]) -> ReportSection | None:
    """Makes the section on recall by length of the context."""
    cards = [(name, card.recall.scores) for name, card in _cards(runs) if card.recall is not None]
    kinds = dict.fromkeys(score.kind for _, scores in cards for score in scores)
    drawings, tables = [], []
    for kind in kinds:
        series = [Series(name, _by_length(scores, kind)) for name, scores in cards if _by_length(scores, kind)]
        models = count_of(len(series), "model")
        about = f"Accuracy of {kind} recall by length of the context for {models}; the table has the figures."
        text = ChartText(file_name("recall", kind), f"Recall: {kind}", about)
        across = ChartAxis("tokens of context", short_count)
        drawings.append(draw_chart(text, across, ChartAxis("share of right answer tokens", is_log=False), series))
        rows = tuple(
            (
                name,
                f"{score.length:,}",
                "-" if score.depth is None else f"{score.depth:g}",
                with_error(score.accuracy, score.error),
                f"{score.exact:.3f}",
                str(score.num_items),
            )
            for name, scores in cards
            for score in scores
            if score.kind == kind
        )
        head = ("model", "tokens", "place", "accuracy", "exact", "items")
        tables.append(ReportTable(f"Recall: {kind}", head, rows))
    if not drawings:
        return None
    intro = (
        "Texts made on the spot. Accuracy is by teacher forcing: the share of answer tokens that are the model's "
        "likeliest after the right tokens before them; nothing is generated. Exact: the share of items whose answer "
        "tokens are all right. Several places of the needle at one length are drawn as their mean."
    )
    return ReportSection("recall", "Recall by length", intro, tuple(drawings), tuple(tables))


def _by_length(scores: Sequence[RecallScore], kind: str) -> tuple[PlotPoint, ...]:
    lengths = sorted({score.length for score in scores if score.kind == kind})
    points = []
    for length in lengths:
        found = [score for score in scores if score.kind == kind and score.length == length]
        mean = average([Difference(score.accuracy, score.error) for score in found])
        ends = (None, None) if mean.error is None else (mean.value - mean.error, mean.value + mean.error)
        points.append(PlotPoint(float(length), mean.value, *ends, tip=f"{length:,} tokens: {mean.value:.3f}"))
    return tuple(points)


def tasks(runs: Sequence[ReportRun]) -> ReportSection | None:
    """Makes the section on few-shot tasks."""
    cards = [(name, card.tasks) for name, card in _cards(runs) if card.tasks is not None]
    if not cards:
        return None
    names = list(dict.fromkeys(task.name for _, section in cards for task in section.tasks))
    rows = []
    for task in names:
        found = [next((each for each in section.tasks if each.name == task), None) for _, section in cards]
        chance = next((each.chance for each in found if each is not None), None)
        bars = tuple(None if each is None else Bar(each.value, each.error) for each in found)
        rows.append(BarRow(task, bars, chance))
    if all(section.tasks for _, section in cards):
        rows.append(BarRow("average", tuple(Bar(section.average, section.average_error) for _, section in cards)))
    text = ChartText(
        "tasks",
        "Few-shot tasks",
        f"Scores of {count_of(len(cards), 'model')} in {count_of(len(names), 'task')}, chance dashed.",
    )
    drawing = draw_bars(text, "score; dashed: chance", [name for name, _ in cards], rows, lambda value: f"{value:.2f}")
    head = ("task", "model", "metric", "score", "chance", "shots", "items")
    figures = tuple(
        (
            task.name,
            name,
            task.metric,
            with_error(task.value, task.error, 4),
            _chance(task),
            str(task.shots),
            _items(task),
        )
        for name, section in cards
        for task in section.tasks
    )
    averages = tuple(
        ("average", name, "-", with_error(section.average, section.average_error, 4), "-", "-", section.harness)
        for name, section in cards
    )
    table = ReportTable("Few-shot tasks", head, (*figures, *averages))
    return ReportSection("tasks", "Few-shot tasks", "Bars are one standard error over items.", (drawing,), (table,))


def _chance(task: TaskScore) -> str:
    return "-" if task.chance is None else f"{task.chance:.3f}"


def _items(task: TaskScore) -> str:
    return f"{task.num_items:,} of {task.num_available:,}"


def noise(runs: Sequence[ReportRun]) -> ReportSection | None:
    """Makes the section on noise and on a hybrid's branches off: bits per byte that each change costs."""
    drawings, tables = [], []
    for kind, title in (("noise", "After noisy text"), ("branches", "Branches off")):
        cards = [(name, getattr(card, kind)) for name, card in _cards(runs) if getattr(card, kind)]
        if not cards:
            continue
        changes = list(dict.fromkeys(_change(score) for _, scores in cards for score in scores))
        rows = []
        for change in changes:
            found = [next((each for each in scores if _change(each) == change), None) for _, scores in cards]
            bars = tuple(None if each is None else Bar(each.difference, each.difference_error) for each in found)
            rows.append(BarRow(change, bars))
        counts = f"{count_of(len(changes), 'change')} in {count_of(len(cards), 'model')}"
        about = f"Bits per byte lost by {counts}; the table has the figures."
        text = ChartText(kind, title, about)
        names = [name for name, _ in cards]
        drawings.append(draw_bars(text, "bits per byte lost", names, rows, lambda value: f"{value:+.3f}"))
        tables.append(ReportTable(title, ("change", "model", "bits per byte", "lost"), tuple(_noise_rows(cards))))
    if not drawings:
        return None
    intro = (
        "Bits per byte that a change costs on the same text: noise in the first half of an opening, whose clean second "
        "half is scored, or a branch off. Bars are one standard error."
    )
    return ReportSection("noise", "Noise and branches", intro, tuple(drawings), tuple(tables))


def _change(score: NoiseScore | BranchScore) -> str:
    return f"{score.kind}, {score.share:.0%}" if isinstance(score, NoiseScore) else score.branch


def _noise_rows(cards: Sequence[tuple[str, Sequence[NoiseScore | BranchScore]]]) -> Iterator[tuple[str, ...]]:
    for name, scores in cards:
        for each in scores:
            lost = with_error(each.difference, each.difference_error, 4)
            yield _change(each), name, f"{each.bits_per_byte:.4f}", lost


def speed(runs: Sequence[ReportRun]) -> ReportSection | None:
    """Makes the section on measured speed and memory of one stream."""
    rows = []
    batches: list[Series] = []
    for name, card in _cards(runs):
        for each, label in ((card.speed, name), (card.speed and card.speed.against, f"{name}: its source")):
            if each is None:
                continue
            rows.append(
                (
                    label,
                    f"{each.tokens_per_second:.1f}",
                    f"{1000 * each.first_token:.1f}",
                    "-" if each.peak_memory is None else f"{each.peak_memory:,}",
                    f"{each.weight_bytes:,}",
                    f"{each.state_bytes:,}",
                    f"{each.prompt_tokens} + {each.new_tokens}",
                )
            )
            points = tuple(PlotPoint(float(size), rate) for size, rate in sorted(each.batch_tokens_per_second.items()))
            batches += [Series(label, points)] if points else []
    if not rows:
        return None
    head = ("model", "tokens/s", "first token, ms", "peak bytes", "weight bytes", "state bytes", "tokens")
    drawings: tuple[Drawing, ...] = ()
    if batches:
        about = "Tokens per second over all rows by number of rows; the time includes the prefill."
        text = ChartText("speed", "Speed by rows", about)
        axes = ChartAxis("rows in one batch", plain), ChartAxis("tokens per second")
        drawings = (draw_chart(text, *axes, batches),)
    table = ReportTable("Speed and memory of one stream", head, tuple(rows))
    return ReportSection("speed", "Speed", "Medians, the source in turns with the model.", drawings, (table,))
