import pytest
import torch

from refold.generation.stream import TokenStream


def test_the_prompt_is_left_out_and_every_token_arrives():
    def work(streamer, stop):
        streamer.put(torch.tensor([[1, 2, 3]]))
        for token in range(50):
            streamer.put(torch.tensor([token]))
        streamer.end()

    with TokenStream(work) as tokens:
        assert list(tokens) == list(range(50))


def test_an_error_after_some_tokens_is_raised_after_them():
    def work(streamer, stop):
        streamer.put(torch.tensor([[0]]))
        streamer.put(torch.tensor([7]))
        raise ValueError("broken")

    with TokenStream(work) as tokens:
        reading = iter(tokens)
        assert next(reading) == 7
        with pytest.raises(ValueError, match="broken"):
            next(reading)


def test_leaving_the_body_sets_the_stopping_criterion():
    rounds = []

    def work(streamer, stop):
        streamer.put(torch.tensor([[0]]))
        ids = torch.zeros(2, 1, dtype=torch.long)
        while not bool(stop(ids, torch.empty(0)).all()):
            streamer.put(torch.tensor([1]))
            rounds.append(1)

    with TokenStream(work) as tokens:
        assert next(iter(tokens)) == 1
    assert rounds
