import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refold.errors import FolderError, RefoldError
from refold.evaluation.result import DocumentScores, Evaluation, KindScores, Machine, ModelFacts
from refold.scorecard.compare import compare
from refold.scorecard.figures import list_figures
from refold.scorecard.record import (
    ExitChoice,
    ExitSection,
    NoiseScore,
    RecallScore,
    RecallSection,
    Scorecard,
    SpeedSection,
    TaskScore,
    TaskSection,
)
from refold.scorecard.score_table import ScoreCell, ScoreTable

COUNT = 40
MACHINE = Machine(device="cpu", device_name="x86_64", cpus=2, torch_threads=1, system="Linux")


def facts(name: str, tokenizer: str = "t") -> ModelFacts:
    plain = {"model_type": "refold", "parameters": 10, "dtype": "float32"}
    return ModelFacts(name=name, weight_bytes=40 + len(name), tokenizer=tokenizer, **plain)


def card(name: str, tokenizer: str = "t", **sections: Any) -> Scorecard:
    plain: dict[str, Any] = {"settings": {}, "machine": MACHINE, "versions": {}, "time": "now"}
    return Scorecard(model=facts(name, tokenizer), **{**plain, **sections})


def tasks(seed: int, shift: float = 0.0, count: int = 200, names: tuple[str, ...] = ("piqa", "copa")) -> TaskSection:
    """Scores of one easiness for each item; `seed` draws the answers."""
    easy = np.random.default_rng(9).random(count)
    generator = np.random.default_rng(seed)
    scores = []
    for name in names:
        right = (generator.random(count) < np.clip(easy + shift, 0, 1)).astype(np.float64)
        fields: dict[str, Any] = {"metric": "acc", "chance": 0.5, "metrics": {"acc": right.mean()}, "version": "1"}
        items = tuple(f"{name}{number}" for number in range(count))
        error = float(right.std(ddof=1) / math.sqrt(count))
        fields |= {"shots": 0, "num_items": count, "num_available": count, "items": items, "right": tuple(right)}
        scores.append(TaskScore(name=name, value=float(right.mean()), error=error, **fields))
    average = float(np.mean([score.value for score in scores]))
    return TaskSection(tasks=tuple(scores), average=average, average_error=0.02, harness="lm-eval", seconds=1.0)


NOISE = NoiseScore(kind="swapped letters", share=0.1, bits_per_byte=2.0, difference=1.0, difference_error=0.01)


def recall(*items: str) -> RecallSection:
    plain: dict[str, Any] = {"accuracy": 0.5, "exact": 0.5, "num_items": 2, "error": 0.5, "right": (1.0, 0.0)}
    score = RecallScore(kind="copying", length=64, depth=None, items=items, **plain)
    return RecallSection(scores=(score,), seed=0, seconds=1.0)


def exit_choice(rule: str, depths: float, bits: float) -> ExitChoice:
    return ExitChoice(rule=rule, mean_depths=depths, bits_per_byte=bits, agreement=0.9, accuracy=0.5)


@pytest.fixture
def text(make_evaluation) -> Callable[..., Evaluation]:
    """Makes evaluations of the same documents; a shift in bits per byte, and noise for each document."""

    def make(shift: float = 0.0, seed: int | None = None, prefix: str = "d", **fields: Any) -> Evaluation:
        base = np.random.default_rng(1)
        sizes = base.integers(200, 2000, COUNT)
        bits = sizes * (base.normal(1.2, 0.2, COUNT) + shift)
        if seed is not None:
            bits = bits + sizes * np.random.default_rng(seed).normal(0, 0.01, COUNT)
        nats = np.round(bits * math.log(2), 4)
        documents = DocumentScores(
            hashes=tuple(f"{prefix}{number}" for number in range(COUNT)),
            bytes=tuple(map(int, sizes)),
            tokens=tuple(int(size) // 4 for size in sizes),
            right=tuple(int(size) // 12 for size in sizes),
            nats=tuple(map(float, nats)),
        )
        value = float(bits.sum() / sizes.sum())
        plain: dict[str, Any] = {"by_document": documents, "bits_per_byte": value, "bits_per_byte_error": 0.03}
        return make_evaluation(**{**plain, "documents": COUNT, **fields})

    return make


def cell(found: ScoreTable, name: str, place: int = 1) -> ScoreCell:
    (row,) = (row for row in found.rows if row.name == name)
    chosen = row.cells[place]
    assert chosen is not None
    return chosen


def names(found: ScoreTable) -> list[str]:
    return [row.name for row in found.rows]


def test_a_difference_that_documents_agree_on_is_called(text):
    base, worse = card("a", text=text(seed=1)), card("b", text=text(0.01, seed=2))
    found = cell(compare([base, worse]), "bits per byte")
    assert (found.pairs, found.verdict) == (COUNT, "worse")
    assert found.difference is not None
    assert found.difference_error is not None
    assert found.difference == pytest.approx(0.01, abs=3 * found.difference_error)
    # The spread of documents is ten times as large.
    assert found.difference_error < 0.004
    back = cell(compare([worse, base]), "bits per byte")
    assert (back.difference, back.p, back.verdict) == (-found.difference, pytest.approx(found.p), "better")


def test_another_seed_moves_nothing_that_is_called_significant(text):
    called = 0
    for seed in range(40):
        base = card("a", text=text(seed=2 * seed), tasks=tasks(2 * seed))
        other = card("b", text=text(seed=2 * seed + 1), tasks=tasks(2 * seed + 1))
        found = compare([base, other])
        called += any(row.cells[1] and row.cells[1].verdict in ("better", "worse") for row in found.rows)
    # One in twenty columns may have a false call; six of forty or more come with a chance of 1%.
    assert called <= 5
    same = compare([base, base])
    tested = [row.cells[1] for row in same.rows if row.cells[1] is not None and row.cells[1].p is not None]
    assert [each.p for each in tested] == [1.0] * len(tested)


def test_tasks_are_paired_by_item_and_averaged_over_those_of_all_models():
    good = card("b", tasks=tasks(2, shift=0.15, names=("copa", "piqa", "more")))
    found = compare([card("a", tasks=tasks(1)), good])
    assert names(found)[1:] == ["piqa acc, 0 shots", "copa acc, 0 shots", "average of tasks (2)", "more acc, 0 shots"]
    parts = [cell(found, name) for name in names(found)[1:3]]
    mean = cell(found, "average of tasks (2)")
    assert (mean.pairs, mean.verdict) == (200, "better")
    assert mean.difference == pytest.approx(np.mean([part.difference or 0.0 for part in parts]))
    errors = [part.difference_error or 0.0 for part in parts]
    assert mean.difference_error == pytest.approx(math.hypot(*errors) / 2)
    assert cell(found, "more acc, 0 shots").difference is None


def test_holms_correction_is_over_the_tested_rows_of_a_column(text):
    found = compare([card("a", text=text(), tasks=tasks(1)), card("b", text=text(0.001, seed=3), tasks=tasks(3))])
    tested = [row.cells[1] for row in found.rows if row.cells[1] is not None and row.cells[1].p is not None]
    assert len(tested) == 5
    smallest = min(tested, key=lambda each: each.p or 0.0)
    assert smallest.corrected_p == pytest.approx(min(1.0, 5 * (smallest.p or 0.0)))


def test_items_and_documents_of_another_draw_are_not_paired(text):
    other = tasks(2)
    renamed = [task.model_copy(update={"items": tuple(f"x{item}" for item in task.items)}) for task in other.tasks]
    apart = card("b", text=text(0.01, prefix="e"), tasks=other.model_copy(update={"tasks": tuple(renamed)}))
    found = compare([card("a", text=text(), tasks=tasks(1)), apart])
    assert found.columns[1].pairs == {"text": (0, 0), "tasks": (0, 0)}
    assert "text: 0 of 40 documents are among the baseline's 40" in found.columns[1].notes
    assert cell(found, "bits per byte").verdict == "undecided"
    assert cell(found, "bits per byte").difference_error == pytest.approx(math.hypot(0.03, 0.03))


def test_kinds_of_text_are_paired_within_their_ranges(text):
    def kinds(rows: int, bits: tuple[float, float]) -> tuple[KindScores, ...]:
        plain: dict[str, Any] = {"documents": rows, "tokens": 9, "bytes": 9, "perplexity": 2.0, "accuracy": 0.5}
        plain["bits_per_byte_error"] = 0.1
        first = KindScores(name="/x/books.txt", rows=(0, rows), bits_per_byte=bits[0], **plain)
        return first, KindScores(name="/x/docs.txt", rows=(rows, COUNT), bits_per_byte=bits[1], **plain)

    base, other = text(kinds=kinds(30, (1.0, 1.0))), text(0.02, kinds=kinds(30, (1.1, 1.1)))
    found = compare([card("a", text=base), card("b", text=other)])
    assert (cell(found, "bits per byte, books.txt").pairs, cell(found, "bits per byte, docs.txt").pairs) == (30, 10)
    assert cell(found, "bits per byte, docs.txt").difference == pytest.approx(0.02, abs=1e-4)


def test_models_of_different_tokenizers_are_compared_by_bytes_and_tasks(text):
    sections = {"text": text(), "tasks": tasks(1), "recall": recall("a1", "b2"), "noise": (NOISE,)}
    sections["exits"] = ExitSection(depths=(2,), num_depths=4, choices=(exit_choice("oracle", 2.5, 1.0),))
    same = compare([card("a", **sections), card("b", **sections)])
    by_token = ("perplexity", "accuracy of tokens", "copying, 64 tokens", "oracle: bits per byte", "oracle: depths")
    assert {*by_token, "noise: swapped letters, 10%"} <= set(names(same))
    assert cell(same, "copying, 64 tokens").pairs == 2
    other = compare([card("a", **sections), card("b", tokenizer="u", **sections)])
    for name in (*by_token, "noise: swapped letters, 10%"):
        (row,) = (row for row in other.rows if row.name == name)
        assert row.cells[1] is None
    assert cell(other, "bits per byte").pairs == COUNT
    assert cell(other, "piqa acc, 0 shots").pairs == 200
    said = (
        "left out: perplexity, accuracy of tokens, recall, exits, noise: the tokenizer is another than the baseline's"
    )
    assert other.columns[1].notes == (said,)


def test_recall_is_paired_by_its_items():
    base = card("a", recall=recall("a1", "b2"))
    assert cell(compare([base, card("b", recall=recall("b2", "a1"))]), "copying, 64 tokens").pairs == 2
    # Items of another text, as of verbatim continuation, and records without hashes.
    for items in (("c3", "d4"), ()):
        assert cell(compare([base, card("b", recall=recall(*items))]), "copying, 64 tokens").pairs == 0


def test_documents_cut_into_other_numbers_of_tokens_show_another_tokenizer(text):
    cut = text()
    documents = cut.by_document.model_copy(update={"tokens": tuple(n + 1 for n in cut.by_document.tokens)})
    longer = cut.model_copy(update={"by_document": documents, "tokens": 21})
    found = compare([card("a", text=cut), card("b", text=longer)])
    assert "the tokenizer is another" in found.columns[1].notes[0]


def test_files_of_format_1_are_compared_without_pairs(text, make_evaluation, tmp_path: Path):
    for name, bits in (("a", 1.5), ("b", 1.9)):
        older = make_evaluation(bits_per_byte=bits, bits_per_byte_error=0.05, documents=30, format=1)
        older.write(tmp_path / f"{name}.json")
    found = compare([tmp_path / "a.json", tmp_path / "b.json"])
    assert [column.name for column in found.columns] == ["a", "b"]
    assert "text: not paired: a file of format 1 has no sums by document; evaluate again" in found.columns[1].notes
    assert (cell(found, "bits per byte").pairs, cell(found, "bits per byte").verdict) == (0, "worse")
    # The same number of tokens of the same text stands for the same tokenizer.
    assert cell(found, "perplexity").difference == 0


def test_exits_noise_and_speed_are_rows(text):
    def sections(bits: float, speed: float) -> dict[str, Any]:
        choices = tuple(exit_choice(rule, depths, bits) for rule, depths in (("full depth", 4.0), ("oracle", 2.5)))
        noise = NOISE.model_copy(update={"difference": bits, "difference_error": 0.01, "num_documents": 12})
        plain: dict[str, Any] = {"prompt_tokens": 64, "new_tokens": 32, "repeats": 3, "threads": 1, "dtype": "float32"}
        plain |= {"peak_memory": None, "weight_bytes": 100, "state_bytes": 10, "first_token": 0.1}
        return {
            "exits": ExitSection(depths=(2,), num_depths=4, choices=choices),
            "noise": (noise,),
            "speed": SpeedSection(tokens_per_second=speed, batch_tokens_per_second={8: 3 * speed}, **plain),
        }

    base, other = card("a", **sections(1.0, 50.0)), card("b", **sections(1.5, 60.0))
    found = compare([base, other])
    assert cell(found, "oracle: depths").value == 2.5
    assert cell(found, "oracle: bits per byte").difference == 0.5
    assert cell(found, "oracle: bits per byte").verdict is None
    swapped = cell(found, "noise: swapped letters, 10%")
    assert (swapped.difference, swapped.difference_error) == (0.5, pytest.approx(0.01 * 2**0.5))
    # A model that reads less of the text before loses less by noise there: neither better nor worse.
    assert swapped.verdict is None
    assert swapped.p is None
    figures = {key.name: figure for key, figure in list_figures(other)}
    assert figures["noise: swapped letters, 10%"].count == 12
    assert cell(found, "tokens per second with prefill, 8 at once").difference == pytest.approx(30.0)
    assert "peak memory" not in names(found)
    elsewhere = other.model_copy(update={"machine": MACHINE.model_copy(update={"device_name": "H100"})})
    apart = compare([base, elsewhere])
    assert next(row for row in apart.rows if row.name == "tokens per second").cells[1] is None
    assert apart.columns[1].notes[0].startswith("left out: speed: measured on another machine")
    longer = other.model_copy(update={"speed": other.speed and other.speed.model_copy(update={"new_tokens": 64})})
    assert next(row for row in compare([base, longer]).rows if row.name == "tokens per second").cells[1] is None


def test_bits_per_byte_of_exits_are_paired_by_document() -> None:
    names, sizes = tuple(f"document {index}" for index in range(12)), (100,) * 12
    # Documents differ far more from each other than the two models do on one of them.
    base_nats = np.random.default_rng(0).normal(100, 30, 12)

    def exits(nats: np.ndarray, documents: tuple[str, ...] = names) -> ExitSection:
        bits = float(nats.sum()) / math.log(2) / sum(sizes)
        choice = exit_choice("exit after 2", 2.0, bits).model_copy(update={"nats": tuple(nats.tolist())})
        return ExitSection(
            depths=(2,), num_depths=4, choices=(choice,), num_documents=12, documents=documents, bytes=sizes
        )

    base = card("a", exits=exits(base_nats))
    worse = base_nats + np.random.default_rng(1).normal(3, 1, 12)
    found = compare([base, card("b", exits=exits(worse))])
    bits = cell(found, "exit after 2: bits per byte")
    assert (bits.pairs, bits.verdict) == (12, "worse")
    changes = (worse - base_nats) / math.log(2) / 100
    assert bits.difference == pytest.approx(changes.mean())
    assert bits.difference_error == pytest.approx(changes.std(ddof=1) / 12**0.5)
    depths = cell(found, "exit after 2: depths")
    assert (depths.difference, depths.verdict) == (0.0, None)
    # Other documents of the same spread: two samples, whose difference drowns in it.
    others = exits(worse, tuple(f"other {index}" for index in range(12)))
    apart = cell(compare([base, card("b", exits=others)]), "exit after 2: bits per byte")
    assert (apart.pairs, apart.verdict) == (0, "undecided")


def test_other_windows_are_said(text):
    found = compare([card("a", text=text()), card("b", text=text(context=32, stride=16))])
    assert found.columns[1].notes == (
        "windows of 32 tokens, stride 16, the baseline's 16 and 8: longer ones predict better",
    )


def test_models_of_one_name_are_told_apart_by_their_files(text, tmp_path: Path):
    for name in ("plain", "rounded"):
        card("m", text=text()).write(tmp_path / f"{name}.json")
    files = [tmp_path / "plain.json", tmp_path / "rounded.json"]
    assert [column.name for column in compare(files).columns] == ["plain", "rounded"]
    twice = [card("x/m", text=text())] * 2
    assert [column.name for column in compare(twice).columns] == ["m", "m (2)"]
    assert [column.name for column in compare(twice, names=["p", "q"]).columns] == ["p", "q"]


def test_what_cannot_be_compared_is_refused(text, tmp_path: Path):
    base = card("a", text=text())
    with pytest.raises(RefoldError, match=r"compare: at least two scorecards are required \(got 1\); name another"):
        compare([base])
    with pytest.raises(RefoldError, match=r"a name for each of 2 scorecards is required \(got 1\)"):
        compare([base, base], names=["x"])
    with pytest.raises(RefoldError, match=r"a section that two scorecards have is required \(got none\); evaluate"):
        compare([base, card("b", tasks=tasks(1))])
    with pytest.raises(FolderError, match=r"a readable scorecard is required .*; evaluate first"):
        compare([base, tmp_path / "none.json"])
