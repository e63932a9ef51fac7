"""Tables of a scorecard, one for each section."""

from collections.abc import Callable, Sequence
from typing import Any

from refold.cli.evaluation_tables import print_evaluation, weights, with_error
from refold.cli.show import format_bytes, print_table, print_text
from refold.scorecard.record import (
    BranchScore,
    ExitSection,
    NoiseScore,
    RecallSection,
    Scorecard,
    SpeedSection,
    TaskSection,
)

RECALL_RULE = (
    "Accuracy is by teacher forcing: each answer token is predicted after the right tokens before it, and nothing is "
    "generated. Exact: share of items whose answer tokens are all right. Gain: nats by which an answer token is "
    "likelier than at its earlier mention."
)


def print_scorecard(card: Scorecard) -> None:
    """Prints every section of a scorecard, and the reason of each section that could not run."""
    if card.text is None:
        print(f"{card.model.name}: {weights(card.model)}")
    else:
        print_evaluation(card.text)
    for name, show in SECTION_TABLES.items():
        found = getattr(card, name)
        if found:
            print()
            show(found)
    if card.not_run:
        print()
    for each in card.not_run:
        print_text(f"{each.section}: not run: {each.why}")


def _print_tasks(found: TaskSection) -> None:
    rows = [
        (
            each.name,
            each.metric,
            percent(each.value, each.error),
            "-" if each.chance is None else f"{each.chance:.1%}",
            str(each.shots),
            f"{each.num_items:,}" + ("" if each.num_items == each.num_available else f" of {each.num_available:,}"),
        )
        for each in found.tasks
    ]
    rows.append(("average", "", percent(found.average, found.average_error), "", "", ""))
    print_table(("task", "metric", "score", "chance", "shots", "items"), rows)
    print_text(f"scored through {found.harness} in {found.seconds:,.0f} seconds")


def _print_recall(found: RecallSection) -> None:
    rows = [
        (
            each.kind,
            f"{each.length:,}",
            "-" if each.depth is None else f"{each.depth:.0%}",
            percent(each.accuracy, each.error),
            "-" if each.chance is None else f"{each.chance:.1%}",
            f"{each.exact:.1%}",
            "-" if each.gain is None else f"{each.gain:+.1f}",
            f"{each.num_items:,}",
        )
        for each in found.scores
    ]
    print_table(("recall", "tokens", "depth", "accuracy", "chance", "exact", "gain", "items"), rows)
    for line in (RECALL_RULE, *found.notes):
        print_text(line)


def _print_exits(found: ExitSection) -> None:
    rows = [
        (
            each.rule,
            f"{each.mean_depths:.2f} of {found.num_depths}",
            f"{each.bits_per_byte:.4f}",
            f"{each.accuracy:.2%}",
            f"{each.agreement:.2%}",
        )
        for each in found.choices
    ]
    print_table(("rule for leaving", "depths", "bits per byte", "accuracy", "agrees with full depth"), rows)
    for line in found.notes:
        print_text(line)


def _print_branches(found: Sequence[BranchScore]) -> None:
    rows = [
        (each.branch, f"{each.bits_per_byte:.4f}", with_error(each.difference, each.difference_error, "+"))
        for each in found
    ]
    print_table(("branch off", "bits per byte", "difference"), rows)


def _print_noise(found: Sequence[NoiseScore]) -> None:
    rows = [
        (
            each.kind,
            f"{each.share:.0%}",
            f"{each.bits_per_byte:.4f}",
            with_error(each.difference, each.difference_error, "+"),
        )
        for each in found
    ]
    print_table(("noise", "share", "bits per byte", "difference"), rows)


def _print_speed(found: SpeedSection) -> None:
    columns = [found] if found.against is None else [found, found.against]
    names = ("one stream", "model") if found.against is None else ("one stream", "model", "source")
    lines: list[tuple[str, Callable[[SpeedSection], str]]] = [
        (f"first token after {found.prompt_tokens:,}", lambda each: f"{1000 * each.first_token:,.1f} ms"),
        ("tokens per second", lambda each: f"{each.tokens_per_second:,.1f}"),
        ("peak memory", lambda each: "-" if each.peak_memory is None else format_bytes(each.peak_memory)),
        ("weights in memory", lambda each: format_bytes(each.weight_bytes)),
        ("cache and state", lambda each: format_bytes(each.state_bytes)),
    ]
    for rows in found.batch_tokens_per_second:
        lines.append((f"with prefill, {rows} at once", lambda each, rows=rows: _batch_speed(each, rows)))
    print_table(names, [(name, *(show(each) for each in columns)) for name, show in lines])
    print_text(
        f"medians of {found.repeats} runs of {found.new_tokens:,} new tokens; {found.threads} threads, {found.dtype}"
    )
    if found.ratio is not None:
        print_text(f"{found.ratio:.2f} times the source's tokens per second, the median of the rounds")
    for line in found.notes:
        print_text(line)


def _batch_speed(found: SpeedSection, rows: int) -> str:
    speed = found.batch_tokens_per_second.get(rows)
    return "-" if speed is None else f"{speed:,.1f}"


SECTION_TABLES: dict[str, Callable[[Any], None]] = {
    "tasks": _print_tasks,
    "recall": _print_recall,
    "exits": _print_exits,
    "branches": _print_branches,
    "noise": _print_noise,
    "speed": _print_speed,
}
"""The function that prints each section, by its field of `Scorecard`."""


def percent(value: float, error: float | None) -> str:
    """Returns a share with its standard error, as `51.3% ± 1.2`."""
    return f"{value:.1%}" + ("" if error is None else f" ± {100 * error:.1f}")
