"""The figures of a scorecard that a comparison has as rows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from refold.evaluation.result import Evaluation, KindScores
from refold.scorecard.names import short_names
from refold.scorecard.pairing import Figure, Units
from refold.scorecard.record import ExitSection, RecallSection, Scorecard, SpeedSection, TaskScore

RowUnit = Literal["bytes", "bits", "share", "seconds", "rate", "number"]
"""`rate` is a number of tokens per second, `bits` a number of bits per byte."""
RowSection = Literal["size", "text", "tasks", "recall", "exits", "noise", "speed"]
"""Section of a scorecard that a row is from; `size` is the model itself."""


@dataclass(frozen=True)
class RowKey:
    """A row of a comparison.

    Attributes:
        section: The section.
        name: Name of the figure.
        unit: Its unit.
        is_better: Whether the lower or the higher value is better; None: neither.
        is_tested: Whether a difference is tested, where its error is known.
        is_by_token: Whether the figure counts tokens, or is of texts cut by tokens: it has a meaning for one tokenizer.
    """

    section: RowSection
    name: str
    unit: RowUnit
    is_better: Literal["lower", "higher"] | None
    is_tested: bool = False
    is_by_token: bool = False


def list_figures(card: Scorecard) -> Iterator[tuple[RowKey, Figure]]:
    """Yields the figures of a scorecard with their rows, in the order of a comparison; the average of tasks is none."""
    yield RowKey("size", "weight bytes", "bytes", "lower"), Figure(float(card.model.weight_bytes))
    if card.text is not None:
        yield from _list_text(card.text)
    for task in () if card.tasks is None else card.tasks.tasks:
        yield task_row(task), task_figure(task)
    if card.recall is not None:
        yield from _list_recall(card.recall)
    if card.exits is not None:
        yield from _list_exits(card.exits)
    for noise in card.noise:
        # A model that reads less of the text before loses less by noise there, which is no merit.
        row = RowKey("noise", f"noise: {noise.kind}, {noise.share:.0%}", "bits", None, is_by_token=True)
        yield row, Figure(noise.difference, noise.difference_error, noise.num_documents)
    if card.speed is not None:
        yield from _list_speed(card.speed)


def task_row(task: TaskScore) -> RowKey:
    """Returns the row of a task; scores of another number of examples or another metric are another row."""
    return RowKey("tasks", f"{task.name} {task.metric}, {task.shots} shots", "share", "higher", is_tested=True)


def task_figure(task: TaskScore) -> Figure:
    """Returns the score of a task with its items."""
    return Figure(task.value, task.error, task.num_items, _answers(task.items, task.right))


def _answers(items: tuple[str, ...], right: Sequence[float]) -> Units | None:
    """Returns the items of a score; None where some have no hash or no answer that is right or wrong."""
    return _units(items, right, [1] * len(right)) if len(items) == len(right) else None


def _list_text(found: Evaluation) -> Iterator[tuple[RowKey, Figure]]:
    yield _text_row("bits per byte"), _bits_figure(found, found, None)
    for kind, name in zip(found.kinds, short_names([kind.name for kind in found.kinds]), strict=True):
        yield _text_row(f"bits per byte, {name}"), _bits_figure(found, kind, kind.rows)
    row = RowKey("text", "perplexity", "number", "lower", is_by_token=True)
    yield row, Figure(found.perplexity)
    row = RowKey("text", "accuracy of tokens", "share", "higher", is_tested=True, is_by_token=True)
    documents = found.by_document
    units = None
    if documents is not None:
        units = _units(documents.hashes, documents.right, documents.tokens)
    yield row, Figure(found.accuracy, None if units is None else units.error(), found.documents, units)


def _text_row(name: str) -> RowKey:
    return RowKey("text", name, "bits", "lower", is_tested=True)


def _bits_figure(found: Evaluation, scores: Evaluation | KindScores, rows: tuple[int, int] | None) -> Figure:
    documents, units = found.by_document, None
    if documents is not None and (rows is not None or scores is found):
        here = slice(*rows) if rows is not None else slice(None)
        bits = tuple(nats / math.log(2) for nats in documents.nats[here])
        units = _units(documents.hashes[here], bits, documents.bytes[here])
    return Figure(scores.bits_per_byte, scores.bits_per_byte_error, scores.documents, units)


def _units(names: tuple[str, ...], amounts: Sequence[float] | Sequence[int], sizes: Sequence[int]) -> Units:
    return Units(names, np.array(amounts, dtype=np.float64), np.array(sizes, dtype=np.float64))


def _list_recall(found: RecallSection) -> Iterator[tuple[RowKey, Figure]]:
    for score in found.scores:
        place = "" if score.depth is None else f" at {score.depth:.0%}"
        name = f"{score.kind}, {score.length:,} tokens{place}"
        units = _answers(score.items, score.right)
        row = RowKey("recall", name, "share", "higher", is_tested=True, is_by_token=True)
        yield row, Figure(score.accuracy, score.error, score.num_items, units)


def _list_exits(found: ExitSection) -> Iterator[tuple[RowKey, Figure]]:
    for choice in found.choices:
        # Openings are cut by tokens: those of another tokenizer are other texts.
        row = RowKey("exits", f"{choice.rule}: depths", "number", "lower", is_by_token=True)
        yield row, Figure(choice.mean_depths)
        units = None
        if len(choice.nats) == len(found.documents) > 0:
            units = _units(found.documents, [nats / math.log(2) for nats in choice.nats], found.bytes)
        row = RowKey("exits", f"{choice.rule}: bits per byte", "bits", "lower", is_tested=True, is_by_token=True)
        yield row, Figure(choice.bits_per_byte, None if units is None else units.error(), found.num_documents, units)


def _list_speed(found: SpeedSection) -> Iterator[tuple[RowKey, Figure]]:
    figures: list[tuple[str, RowUnit, Literal["lower", "higher"], float | None]] = [
        (f"first token after {found.prompt_tokens:,}", "seconds", "lower", found.first_token),
        ("tokens per second", "rate", "higher", found.tokens_per_second),
        *(
            (f"tokens per second with prefill, {rows} at once", "rate", "higher", speed)
            for rows, speed in found.batch_tokens_per_second.items()
        ),
        ("peak memory", "bytes", "lower", found.peak_memory),
        ("weights in memory", "bytes", "lower", found.weight_bytes),
        (f"cache and state after {found.prompt_tokens + found.new_tokens:,}", "bytes", "lower", found.state_bytes),
    ]
    for name, unit, better, value in figures:
        if value is not None:
            yield RowKey("speed", name, unit, better), Figure(float(value))
