"""Amounts of a scorecard: mistakes are told."""

from dataclasses import fields
from typing import Any

import pytest

from refold.errors import RefoldError
from refold.scorecard.amounts import SECTIONS, ScoreAmounts, read_amounts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recall_items": 0}, r"recall_items: at least 1 is required \(got 0\)"),
        ({"recall_lengths": (128, 8)}, r"recall_lengths: at least 16 is required \(got 8\)"),
        ({"new_tokens": 1}, r"new_tokens: at least 2 is required \(got 1\)"),
        ({"batches": (0,)}, r"batches: at least 1 is required \(got 0\)"),
        ({"noise_shares": (1.5,)}, r"noise_shares: must lie between 0 and 1 \(got 1.5\)"),
        ({"needle_depths": (-0.1,)}, r"needle_depths: must lie between 0 and 1 \(got -0.1\)"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_amounts_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RefoldError, match=message):
        ScoreAmounts(**fields)


def test_amounts_are_read_from_pairs() -> None:
    pairs = ["recall_lengths=512, 4k", "needle_depths=0,0.25,1", "recall_items=32", "repeats=1"]
    found = read_amounts(pairs, ["recall", "speed"])
    assert found == ScoreAmounts(recall_lengths=(512, 4000), needle_depths=(0, 0.25, 1), recall_items=32, repeats=1)
    assert read_amounts([], []) == ScoreAmounts()


def test_every_amount_names_its_sections() -> None:
    assert list(SECTIONS) == [each.name for each in fields(ScoreAmounts)]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["recall_length=512"], r"amount: must be one of .* \(got 'recall_length'\); did you mean 'recall_lengths'\?"),
        (["recall_items"], r"recall_items: one recall_items=VALUE is required \(got 'recall_items'\)"),
        (["recall_items=4", "recall_items=8"], r"recall_items: one .* is required \(got 'recall_items=8' again\)"),
        (["recall_items=few"], r"recall_items: must be a whole number such as 20000000, 20M or 1.5k \(got 'few'\)"),
        (["needle_depths=0,,1"], r"needle_depths: must be a number such as 0.5 \(got ''\)"),
        (["needle_depths=nan"], r"needle_depths: must lie between 0 and 1 \(got nan\)"),
        (["batches=1,0"], r"batches: at least 1 is required \(got 0\)"),
        (["noise_shares=0.1"], r"noise_shares: --noise is required with it"),
        (["opening=64"], r"opening: --exits or --branches or --noise is required with it"),
    ],
    ids=lambda given: given[-1] if isinstance(given, list) else "",
)
def test_mistakes_in_pairs_are_told(pairs: list[str], message: str) -> None:
    with pytest.raises(RefoldError, match=message):
        read_amounts(pairs, ["recall", "speed"])
