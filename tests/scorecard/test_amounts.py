"""Amounts of a scorecard: mistakes are told."""

from typing import Any

import pytest

from refold.errors import RefoldError
from refold.scorecard.amounts import ScoreAmounts


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
