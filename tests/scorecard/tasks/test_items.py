"""Items of tasks from files, and stratified draws."""

from collections import Counter

import pytest

from refold.errors import DataError
from refold.scorecard.tasks.items import draw_order, read_items

FIELDS = ("query", "choices", "gold")
GOOD = {"query": "a", "choices": ["b", "c"], "gold": 1, "note": 3}


def test_items_keep_their_fields_in_order(tmp_path, write_items, monkeypatch):
    write_items(tmp_path / "x.jsonl", [GOOD, {**GOOD, "gold": 0, "note": "text"}])
    expected = [{name: GOOD[name] for name in FIELDS}, {"query": "a", "choices": ["b", "c"], "gold": 0}]
    assert list(read_items("x.jsonl", FIELDS, str(tmp_path), version=1)["test"]) == expected
    monkeypatch.setenv("REFOLD_TASK_DATA", str(tmp_path))
    assert list(read_items("x.jsonl", FIELDS)["test"]) == expected


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"query": "a", "choices": ["b"]}, r"line 2: the field 'gold' is required \(got '?query, choices'?\)"),
        ({**GOOD, "gold": 2}, r"line 2: gold must be the place of the right answer, 0 to 1 \(got 2\)"),
        ({**GOOD, "gold": "b"}, r"line 2: gold must be .* \(got 'b'\)"),
        ({**GOOD, "choices": ["b"]}, r"line 2: at least two texts to choose from are required"),
        ({**GOOD, "choices": ["b", ""]}, r"line 2: at least two texts to choose from are required"),
        ([1], r"line 2: a JSON object is required \(got '\[1\]'\)"),
    ],
)
def test_a_broken_item_is_named(tmp_path, write_items, item, message):
    write_items(tmp_path / "x.jsonl", [GOOD, item])
    with pytest.raises(DataError, match=message):
        read_items("x.jsonl", FIELDS, str(tmp_path))


def test_a_missing_or_empty_file_is_refused(tmp_path, write_items, monkeypatch):
    monkeypatch.delenv("REFOLD_TASK_DATA", raising=False)
    write_items(tmp_path / "arc_easy.jsonl", [])
    with pytest.raises(DataError, match="at least one item is required"):
        read_items("arc_easy.jsonl", FIELDS, str(tmp_path))
    with pytest.raises(DataError, match=r"a file of items is required .*; did you mean 'arc_easy\.jsonl'\?"):
        read_items("arc_eazy.jsonl", FIELDS, str(tmp_path))
    with pytest.raises(DataError, match=r"no \.jsonl file there"):
        read_items("arc_easy.jsonl", FIELDS, str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"give --task-data FOLDER, or .* --metadata task_data=FOLDER"):
        read_items("arc_easy.jsonl", FIELDS)
    (tmp_path / "arc_easy.jsonl").write_text('{"query": ')
    with pytest.raises(DataError, match="line 1: a JSON object is required"):
        read_items("arc_easy.jsonl", FIELDS, str(tmp_path))


def test_every_beginning_of_the_order_is_stratified():
    strata = [0] * 400 + [1] * 200 + [2] * 100
    order = draw_order(strata, 0, "piqa")
    assert sorted(order) == list(range(700))
    for limit in (7, 70, 350):
        counts = Counter(strata[index] for index in order[:limit])
        assert all(abs(counts[stratum] - limit * share / 7) <= 1 for stratum, share in ((0, 4), (1, 2), (2, 1)))


def test_the_order_depends_on_seed_and_task_alone():
    strata = [index % 4 for index in range(200)]
    order = draw_order(strata, 0, "piqa")
    assert order == draw_order(strata, 0, "piqa")
    assert order != draw_order(strata, 1, "piqa")
    assert order != draw_order(strata, 0, "copa")
    # The first items of a file are often alike.
    assert len(set(order[:50]) & set(range(50))) < 30
    assert draw_order(strata, 0, "piqa")[:5] == [order[index] for index in range(5)]
