from dataclasses import fields

import pytest

from refold.errors import RefoldError
from refold.generation.sampling import Sampling


def test_the_default_is_greedy():
    assert Sampling().temperature == 0
    assert not Sampling().has_penalties


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens: at least 1 is required \(got 0\)"),
        ({"temperature": -0.1}, r"temperature: 0 \(greedy\) or more is required \(got -0.1\)"),
        ({"temperature": float("nan")}, r"temperature: 0 \(greedy\) or more is required \(got nan\)"),
        ({"temperature": float("inf")}, r"temperature: 0 \(greedy\) or more is required \(got inf\)"),
        ({"top_p": 0.0}, r"top_p: must be above 0 and at most 1 \(got 0.0\)"),
        ({"top_p": 1.5}, r"top_p: must be above 0 and at most 1 \(got 1.5\)"),
        ({"top_k": -1}, r"top_k: 0 \(all tokens\) or more is required \(got -1\)"),
        ({"top_k": 2**70}, r"top_k: must be at most 9223372036854775807 \(got"),
        ({"seed": -1}, r"seed: 0 to 2\^63 - 1 is required \(got -1\)"),
        ({"seed": 2**63}, r"seed: 0 to 2\^63 - 1 is required \(got"),
        ({"min_p": -0.1}, r"min_p: must be at least 0 and at most 1 \(got -0.1\)"),
        ({"min_p": 1.1}, r"min_p: must be at least 0 and at most 1 \(got 1.1\)"),
        ({"repetition_penalty": 0}, r"repetition_penalty: must be above 0, and 1 is off \(got 0.0\)"),
        ({"repetition_penalty": float("inf")}, r"repetition_penalty: must be above 0, and 1 is off \(got inf\)"),
        ({"presence_penalty": 2.1}, r"presence_penalty: must lie in -2\.\.2 \(got 2.1\)"),
        ({"frequency_penalty": float("nan")}, r"frequency_penalty: must lie in -2\.\.2 \(got nan\)"),
        ({"logprobs": 21}, r"logprobs: must lie in 0\.\.20, or be None \(got 21\)"),
        ({"logprobs": -1}, r"logprobs: must lie in 0\.\.20, or be None \(got -1\)"),
        ({"n": 0}, r"n: must lie in 1\.\.128 \(got 0\)"),
        ({"n": 129}, r"n: must lie in 1\.\.128 \(got 129\)"),
        ({"stop": ""}, r"stop: strings with at least one character are required \(got ''\)"),
        ({"stop": ["a", ""]}, r"stop: strings with at least one character are required"),
        ({"stop": [str(each) for each in range(17)]}, r"stop: must be at most 16 strings \(got 17\)"),
        ({"logit_bias": {5: 101}}, r"logit_bias: a number in -100\.\.100 is required for token 5 \(got 101\)"),
        ({"logit_bias": {5: float("nan")}}, r"logit_bias: a number in -100\.\.100 is required for token 5 \(got nan\)"),
        ({"logit_bias": {5: "high"}}, r"logit_bias: a number in -100\.\.100 is required for token 5 \(got 'high'\)"),
        ({"logit_bias": {-5: 1.0}}, r"logit_bias: token ids of 0 or more are required \(got -5\)"),
        ({"logit_bias": {"x": 1.0}}, r"logit_bias: token ids of 0 or more are required \(got 'x'\)"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict, message: str):
    with pytest.raises(RefoldError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 3.0}, r"max_new_tokens: a whole number is required \(got 3.0\)"),
        ({"n": None}, r"n: a whole number is required \(got None\)"),
        ({"top_k": True}, r"top_k: a whole number is required \(got True\)"),
        ({"temperature": "hot"}, r"temperature: a number is required \(got 'hot'\)"),
        ({"temperature": 10**400}, r"temperature: a number is required \(got a number of 1329 bits\)"),
        ({"top_p": None}, r"top_p: a number is required \(got None\)"),
        ({"ignore_eos": 1}, r"ignore_eos: true or false is required \(got 1\)"),
        ({"stop": 3}, r"stop: a string or a list of strings is required \(got 3\)"),
        ({"stop": ["a", 3]}, r"stop: a string or a list of strings is required"),
        ({"logit_bias": 3}, r"logit_bias: numbers by token id are required \(got 3\)"),
        ({"logit_bias": [1, 2]}, r"logit_bias: numbers by token id are required"),
    ],
)
def test_settings_of_another_type_are_refused(settings: dict, message: str):
    with pytest.raises(RefoldError, match=message):
        Sampling(**settings)


def test_settings_have_one_form_and_can_be_keys():
    given = Sampling(stop="\n", logit_bias={7: 1, 3: -2}, temperature=1)
    assert given == Sampling(stop=["\n", "\n"], logit_bias=((3, -2.0), (7, 1.0)), temperature=1.0)
    assert hash(given) == hash(Sampling(stop=("\n",), logit_bias=[(7, 1), (3, -2)], temperature=1))  # pyright: ignore[reportArgumentType]
    assert given.stop == ("\n",)
    assert given.biases == {3: -2.0, 7: 1.0}
    assert all(each.name in (Sampling.__doc__ or "") for each in fields(Sampling))


@pytest.mark.parametrize(
    "settings", [{"repetition_penalty": 1.5}, {"presence_penalty": 1.5}, {"frequency_penalty": 1.5}], ids=str
)
def test_each_penalty_counts_as_one(settings: dict):
    assert Sampling(**settings).has_penalties
