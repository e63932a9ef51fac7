"""Comparison of scorecards: differences from the first one, paired where possible, tested and corrected."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from refold.errors import RefoldError
from refold.evaluation.result import Evaluation
from refold.scorecard.figures import RowKey, list_figures, task_row
from refold.scorecard.names import numbered_names, short_names
from refold.scorecard.pairing import Difference, Figure, average, pair, subtract
from refold.scorecard.record import Scorecard, read_scorecard
from refold.scorecard.score_table import ScoreCell, ScoreColumn, ScoreRow, ScoreTable
from refold.scorecard.significance import LEVEL, holm

RULE = (
    "A difference is called better or worse if its two-sided p-value is below {level:.0%} after Holm's correction for "
    "all tested rows of its column. Paired differences: Student's t over documents, the exact sign test over answers "
    "that are right or wrong. Not paired: Welch's t. Sizes, speed, depths, noise and perplexity are not tested."
)


def compare(
    scorecards: Sequence[Scorecard | str | Path], names: Sequence[str] | None = None, level: float = LEVEL
) -> ScoreTable:
    """Compares scorecards with the first one.

    Differences are paired by document or by item where both scorecards have the same ones, by the hashes of the texts.
    Models of different tokenizers are compared by bits per byte, tasks and speed; rows that count tokens, or whose
    texts are cut by tokens, are dropped.

    Args:
        scorecards: Scorecards or their files, the baseline first.
        names: Name of each column; None: short names of the models.
        level: Greatest chance that a column without any real difference has a row that is called better or worse.

    Raises:
        RefoldError: There are fewer than two scorecards, or they have no row in common.
        FolderError: A file is missing, broken or of a newer format.
    """
    cards = [read_scorecard(each) if isinstance(each, str | Path) else each for each in scorecards]
    if len(cards) < 2:
        raise RefoldError(f"compare: at least two scorecards are required (got {len(cards)}); name another file")
    given = [str(each) if isinstance(each, str | Path) else "" for each in scorecards]
    titles = list(names) if names is not None else _name_columns(cards, given)
    if len(titles) != len(cards):
        raise RefoldError(f"compare: a name for each of {len(cards)} scorecards is required (got {len(titles)})")
    comparison = _Comparison(cards, level)
    rows = comparison.rows()
    shared = [cell for row in rows if row.section != "size" for cell in row.cells[1:]]
    if not any(cell is not None and cell.difference is not None for cell in shared):
        reasons = "; ".join(line for notes in comparison.notes for line in notes)
        raise RefoldError(
            f"compare: a section that two scorecards have is required (got none{': ' + reasons if reasons else ''}); "
            f"evaluate the models on the same text or tasks"
        )
    columns = [
        ScoreColumn(name=name, model=card.model.name, pairs=_count_pairs(rows, place), notes=tuple(notes))
        for place, (name, card, notes) in enumerate(zip(titles, cards, comparison.notes, strict=True))
    ]
    return ScoreTable(level=level, columns=tuple(columns), rows=tuple(rows), rule=RULE.format(level=level))


def have_one_tokenizer(card: Scorecard, base: Scorecard) -> bool:
    """Returns whether two models have the same tokenizer, so far as their scorecards tell.

    Where a file of format 1 does not name its tokenizer, the same number of tokens of the same text stands for it.
    """
    one, other = card.model.tokenizer, base.model.tokenizer
    if one and other and one != other:
        return False
    if card.text is None or base.text is None:
        return bool(one) and one == other
    return (bool(one) and one == other and not _split_apart(card.text, base.text)) or (
        card.text.tokens == base.text.tokens and card.text.bytes == base.text.bytes and card.text.data == base.text.data
    )


def _split_apart(text: Evaluation, base: Evaluation) -> bool:
    """Returns whether a document that both have was cut into different numbers of tokens."""
    if text.by_document is None or base.by_document is None:
        return False
    one, other = text.by_document, base.by_document
    return any(one.tokens[here] != other.tokens[there] for here, there in pair(one.hashes, other.hashes))


def _name_columns(cards: Sequence[Scorecard], files: Sequence[str]) -> list[str]:
    models = [card.model.name for card in cards]
    if len(set(models)) < len(models) and all(files) and len(set(files)) == len(files):
        return [name.removesuffix(".json") for name in short_names(files)]
    return numbered_names(short_names(models))


def _count_pairs(rows: Sequence[ScoreRow], place: int) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for row in rows:
        cell = row.cells[place]
        if cell is not None and cell.p is not None:
            fewest, most = found.get(row.section, (cell.pairs, cell.pairs))
            found[row.section] = (min(fewest, cell.pairs), max(most, cell.pairs))
    return found


@dataclass
class _Comparison:
    """The figures of all scorecards by row.

    Attributes:
        cards: The scorecards, the baseline first.
        level: The level of the tests.
        notes: Lines on each column.
    """

    cards: Sequence[Scorecard]
    level: float
    notes: list[list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.notes = [[] for _ in self.cards]
        self._figures = [dict(list_figures(card)) for card in self.cards]
        self._average: RowKey | None = None
        self._tasks = self._common_tasks()
        for place, card in enumerate(self.cards[1:], 1):
            self._drop_incomparable(place, card)

    def rows(self) -> list[ScoreRow]:
        """Returns the rows, in the order of their sections, with corrected p-values."""
        keys = self._order()
        columns = [self._cells(keys, place) for place in range(len(self.cards))]
        return [
            ScoreRow(section=key.section, name=key.name, unit=key.unit, is_better=key.is_better, cells=cells)
            for key, cells in zip(keys, zip(*columns, strict=True), strict=True)
            if any(cell is not None for cell in cells)
        ]

    def _order(self) -> list[RowKey]:
        """Returns the rows of all scorecards, by section; within one, in the order of the first that has them."""
        found: dict[str, dict[RowKey, None]] = {}
        for figures in self._figures:
            for key in figures:
                found.setdefault(key.section, {})[key] = None
        sections = ("size", "text", "tasks", "recall", "exits", "noise", "speed")
        return [key for section in sections for key in found.get(section, {})]

    def _common_tasks(self) -> list[RowKey]:
        """Adds the average over the tasks that all models have, and returns their rows."""
        with_tasks = [
            (figures, card.tasks) for figures, card in zip(self._figures, self.cards, strict=True) if card.tasks
        ]
        common = [key for key in self._figures[0] if key.section == "tasks"]
        common = [key for key in common if all(key in figures for figures, _ in with_tasks)]
        if len(common) < 2 or len(with_tasks) < 2:
            return common
        self._average = RowKey("tasks", f"average of tasks ({len(common)})", "share", "higher", is_tested=True)
        for figures, section in with_tasks:
            scores = {task_row(task): task for task in section.tasks}
            mean = average([Difference(scores[key].value, scores[key].error) for key in common])
            figures[self._average] = Figure(mean.value, mean.error)
        return common

    def _drop_incomparable(self, place: int, card: Scorecard) -> None:
        """Removes figures that have no meaning beside the baseline's, and notes the reason."""
        base, figures, notes = self.cards[0], self._figures[place], self.notes[place]

        def drop(reason: str, keys: list[RowKey]) -> None:
            if any(key in self._figures[0] for key in keys):
                notes.append(reason)
            for key in keys:
                del figures[key]

        if not have_one_tokenizer(card, base):
            kept = {key.section for key in figures if not key.is_by_token}
            by_token = [key for key in figures if key.is_by_token]
            named = ", ".join(dict.fromkeys(key.name if key.section in kept else key.section for key in by_token))
            drop(f"left out: {named}: the tokenizer is another than the baseline's", by_token)
        if card.speed is not None and base.speed is not None and _speed_conditions(card) != _speed_conditions(base):
            drop(
                "left out: speed: measured on another machine, with other threads or tokens, or in another dtype",
                [key for key in figures if key.section == "speed"],
            )
        notes += _describe_text(card.text, base.text)

    def _subtract(self, key: RowKey, place: int) -> Difference | None:
        figure, base = self._figures[place].get(key), self._figures[0].get(key)
        if place == 0 or figure is None or base is None:
            return None
        if key == self._average:
            return average([subtract(self._figures[place][each], self._figures[0][each]) for each in self._tasks])
        found = subtract(figure, base)
        return found if key.is_tested else replace(found, p=None)

    def _cells(self, keys: Sequence[RowKey], place: int) -> list[ScoreCell | None]:
        differences = {key: found for key in keys if (found := self._subtract(key, place)) is not None}
        tested = {key: each.p for key, each in differences.items() if each.p is not None}
        corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
        cells: list[ScoreCell | None] = []
        for key in keys:
            figure, difference, p = self._figures[place].get(key), differences.get(key), corrected.get(key)
            if figure is None:
                cells.append(None)
            elif difference is None:
                cells.append(ScoreCell(value=figure.value, error=figure.error))
            else:
                cells.append(
                    ScoreCell(
                        value=figure.value,
                        error=figure.error,
                        difference=difference.value,
                        difference_error=difference.error,
                        pairs=difference.num_pairs,
                        p=difference.p,
                        corrected_p=p,
                        verdict=None if p is None else self._judge(key, difference, p),
                    )
                )
        return cells

    def _judge(self, key: RowKey, difference: Difference, p: float) -> Literal["better", "worse", "undecided"]:
        if p >= self.level:
            return "undecided"
        return "better" if (difference.value > 0) == (key.is_better == "higher") else "worse"


def _speed_conditions(card: Scorecard) -> tuple[str | int, ...]:
    speed, machine = card.speed, card.machine
    assert speed is not None
    return machine.device_name, machine.cpus, speed.threads, speed.dtype, speed.prompt_tokens, speed.new_tokens


def _describe_text(text: Evaluation | None, base: Evaluation | None) -> list[str]:
    """Returns lines on two evaluations that are not of the same windows of the same text."""
    if text is None or base is None:
        return []
    found = []
    if (text.context, text.stride) != (base.context, base.stride):
        found.append(
            f"windows of {text.context} tokens, stride {text.stride}, the baseline's {base.context} and {base.stride}: "
            f"longer ones predict better"
        )
    if text.by_document is None or base.by_document is None:
        found.append("text: not paired: a file of format 1 has no sums by document; evaluate again")
        return found
    one, other = text.by_document.hashes, base.by_document.hashes
    pairs = len(pair(one, other))
    if pairs < max(len(one), len(other)):
        found.append(f"text: {pairs:,} of {len(one):,} documents are among the baseline's {len(other):,}")
    return found
