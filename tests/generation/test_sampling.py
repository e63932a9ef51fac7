import pytest

from refold.errors import RefoldError
from refold.generation.sampling import Sampling


def test_the_default_is_greedy():
    assert Sampling().temperature == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens: at least 1 is required \(got 0\)"),
        ({"temperature": -0.1}, r"temperature: 0 \(greedy\) or more is required \(got -0.1\)"),
        ({"temperature": float("nan")}, r"temperature: 0 \(greedy\) or more is required \(got nan\)"),
        ({"top_p": 0.0}, r"top_p: must be above 0 and at most 1 \(got 0.0\)"),
        ({"top_p": 1.5}, r"top_p: must be above 0 and at most 1 \(got 1.5\)"),
        ({"top_k": -1}, r"top_k: 0 \(all tokens\) or more is required \(got -1\)"),
        ({"seed": -1}, r"seed: 0 to 2\^63 - 1 is required \(got -1\)"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict, message: str):
    with pytest.raises(RefoldError, match=message):
        Sampling(**settings)
