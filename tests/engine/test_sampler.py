import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from refold.engine.randomness import RandomStream
from refold.engine.sampler import Sampler
from refold.errors import RefoldError
from refold.generation.sampling import Sampling

SIZE = 300
DRAWS = 20_000
NARROW = [
    {},
    {"temperature": 0.3},
    {"temperature": 4.0},
    {"top_k": 7},
    {"top_k": 299},
    {"top_k": 1000},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.7, "min_p": 0.05, "temperature": 1.7},
    {"top_k": 3, "top_p": 0.99},
]


def make_logits(rows: int = 1, seed: int = 0, size: int = SIZE, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def sampler_of(*settings: Sampling, size: int = SIZE, prompts: Any = None) -> Sampler:
    sampler = Sampler(size, len(settings))
    for row, each in enumerate(settings):
        sampler.set(row, each, prompts[row] if prompts else [1])
    return sampler


def drawn(**settings: Any) -> Sampling:
    return Sampling(**{"temperature": 1.0, **settings})


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """The statistic over cells with at least five expected draws, others joined, and its bound at five deviations."""
    expected = probabilities * counts.sum()
    large = expected >= 5
    found = [*counts[large], counts[~large].sum()]
    wanted = [*expected[large], expected[~large].sum()]
    pairs = [(have, want) for have, want in zip(found, wanted, strict=True) if want >= 1]
    statistic = sum((have - want) ** 2 / want for have, want in pairs)
    freedom = len(pairs) - 1
    return statistic, freedom + 5 * math.sqrt(2 * freedom) if freedom else 1e-9


def theirs(settings: Sampling, logits: Tensor, ids: list[int]) -> Tensor:
    """The distribution of transformers' processors, in the order in which `generate` applies them."""
    chain = LogitsProcessorList()
    if settings.logit_bias:
        chain.append(logits_process.SequenceBiasLogitsProcessor([[[t], b] for t, b in settings.biases.items()]))
    if settings.repetition_penalty != 1:
        chain.append(logits_process.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    chain.append(logits_process.TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k:
        chain.append(logits_process.TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        chain.append(logits_process.TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        chain.append(logits_process.MinPLogitsWarper(settings.min_p))
    return chain(torch.tensor([ids]), logits.clone()).softmax(dim=-1)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("size", [SIZE, 1024, 20])
def test_distributions_are_those_of_transformers(narrow: dict, size: int):
    for seed in range(3):
        settings, logits = drawn(**narrow), make_logits(1, seed, size)
        ours = sampler_of(settings, size=size).probabilities(logits, [0])
        expected = theirs(settings, logits, [1])
        assert torch.equal(ours > 0, expected > 1e-30)
        assert torch.allclose(ours.float(), expected, atol=1e-6)


@pytest.mark.parametrize("extra", [{}, {"logit_bias": {3: 4.0, 250: -100.0}}], ids=["plain", "bias"])
@pytest.mark.parametrize("penalty", [1.0, 0.5, 1.8])
def test_repetition_penalty_and_bias_are_those_of_transformers(penalty: float, extra: dict):
    settings = drawn(repetition_penalty=penalty, top_p=0.9, **extra)
    sampler, logits = sampler_of(settings, prompts=[[5, 9, 9]]), make_logits()
    for token in (100, 7, 100):
        sampler.note(0, token)
    expected = theirs(settings, logits, [5, 9, 9, 100, 7, 100])
    assert torch.allclose(sampler.probabilities(logits, [0]).float(), expected, atol=1e-6)
    if penalty != 1:
        wrong = theirs(settings, logits, [100, 7])
        assert not torch.allclose(sampler.probabilities(logits, [0]).float(), wrong, atol=1e-6)


def test_presence_and_frequency_are_subtracted_for_new_tokens_alone():
    settings = Sampling(presence_penalty=0.5, frequency_penalty=0.25, temperature=1)
    sampler, logits = sampler_of(settings, prompts=[[5, 9, 9]]), make_logits()
    expected = logits.clone()
    assert torch.equal(sampler.scores(logits, [0]), expected)
    for token in (9, 7, 9, 9):
        sampler.note(0, token)
    expected[0, 9] -= 0.5 + 3 * 0.25
    expected[0, 7] -= 0.5 + 0.25
    assert torch.allclose(sampler.scores(logits, [0]), expected)


def test_drafted_tokens_count_for_penalties_of_their_own_place():
    sampler = sampler_of(Sampling(), Sampling(frequency_penalty=1.0, repetition_penalty=2.0))
    sampler.note(1, 4)
    logits = make_logits(4)
    drafts = torch.tensor([[8, 9], [-1, -1], [4, -1], [4, 6]])
    got = sampler.scores(logits, [0, 1, 1, 1], drafts)
    assert torch.equal(got[0], logits[0])
    for place, tokens in ((1, [4]), (2, [4, 4]), (3, [4, 4, 6])):
        alone = sampler_of(Sampling(frequency_penalty=1.0, repetition_penalty=2.0))
        for token in tokens:
            alone.note(0, token)
        assert torch.allclose(got[place], alone.scores(logits[place : place + 1], [0])[0])


@pytest.mark.parametrize("narrow", [{}, {"top_p": 0.9}, {"top_k": 12}, {"min_p": 0.02}, {"temperature": 2.5}], ids=str)
@pytest.mark.parametrize("size", [SIZE, 33, 8])
def test_frequencies_of_draws_are_those_of_the_distribution(narrow: dict, size: int):
    settings, logits = drawn(seed=11, **narrow), make_logits(size=size, seed=3)
    sampler = sampler_of(settings, size=size)
    tokens: list[int] = []
    for begin in range(0, DRAWS, 500):
        tokens += sampler.choose(logits.expand(500, -1), [0] * 500, list(range(begin, begin + 500))).tokens
    counts = np.bincount(tokens, minlength=size)
    statistic, bound = chi_square(counts, theirs(settings, logits, [1])[0].double().numpy())
    assert statistic < bound
    # Controls: a token that was cut off never comes, and another temperature is seen.
    assert not counts[(sampler.probabilities(logits, [0])[0] == 0).numpy()].any()
    wrong = theirs(drawn(**{**narrow, "temperature": 1.2 * settings.temperature}), logits, [1])[0].double().numpy()
    statistic, bound = chi_square(counts, wrong)
    assert statistic > bound


def test_seeds_repeat_and_choices_differ():
    logits = make_logits(40)
    draws = []
    for seed, choice in ((5, 0), (5, 0), (6, 0), (5, 1)):
        sampler = Sampler(SIZE, 1)
        sampler.set(0, drawn(seed=seed, temperature=3.0), [1], choice)
        draws.append(sampler.choose(logits, [0] * 40, list(range(40))).tokens)
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert draws[0] != draws[3]


def test_tokens_depend_neither_on_the_batch_nor_on_its_order():
    kinds = [
        Sampling(),
        drawn(seed=1),
        drawn(seed=2, top_p=0.9),
        drawn(seed=3, top_k=5),
        Sampling(frequency_penalty=1.5),
        drawn(seed=4, repetition_penalty=1.5, min_p=0.1),
        drawn(seed=5, top_p=0.999, temperature=3.0),
        Sampling(logit_bias={17: 100.0}),
    ]
    sampler, logits = sampler_of(*kinds, size=1000), make_logits(len(kinds), size=1000)
    for row in range(len(kinds)):
        for token in (row, row, 5):
            sampler.note(row, token)
    places = [3, 1, 4, 1, 5, 9, 2, 6]
    alone = [sampler.choose(logits[row : row + 1], [row], [places[row]]).tokens[0] for row in range(len(kinds))]
    assert alone[7] == 17
    for seed in range(5):
        order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed)).tolist()
        got = sampler.choose(logits[order], order, [places[row] for row in order]).tokens
        assert got == [alone[row] for row in order]


def test_greedy_rows_take_the_first_of_the_largest():
    for size in (5, 31, 32, 33, 300, 4096, 10_001):
        logits = make_logits(6, size=size).round()
        chosen = sampler_of(Sampling(), size=size).choose(logits, [0] * 6, [0] * 6)
        assert chosen.tokens == logits.argmax(dim=-1).tolist()
        values = logits.sort(dim=-1, descending=True).values
        assert chosen.gaps == pytest.approx((values[:, 0] - values[:, 1]).tolist())
        assert 0 in chosen.gaps


def test_probabilities_of_a_greedy_row_are_one_token():
    sampler, logits = sampler_of(Sampling(), drawn()), make_logits(2)
    got = sampler.probabilities(logits, [0, 1])
    assert got[0, logits[0].argmax()] == 1
    assert got[0].sum() == 1
    assert torch.allclose(got[1].float(), logits[1].softmax(-1), atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("narrow", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 3, "min_p": 0.5}], ids=str)
def test_a_row_that_is_not_finite_is_named_and_disturbs_nobody(bad: float, narrow: dict):
    kinds = [drawn(seed=row, **narrow) for row in range(4)]
    sampler, logits = sampler_of(*kinds, size=1000), make_logits(4, size=1000)
    right = sampler.choose(logits, range(4), [0] * 4)
    logits[2, 7] = bad
    got = sampler.choose(logits, range(4), [0] * 4)
    assert got.finite == [True, True, False, True]
    assert [*got.tokens[:2], got.tokens[3]] == [*right.tokens[:2], right.tokens[3]]
    assert got.tokens[2] == 0


def test_tokens_that_the_model_excludes_are_no_fault():
    logits = make_logits(1)
    logits[0, :-1] = -math.inf
    for settings in (Sampling(), drawn(), drawn(top_p=0.5), drawn(temperature=1e-300), drawn(temperature=1e300)):
        chosen = sampler_of(settings).choose(logits, [0], [0])
        assert chosen.tokens == [SIZE - 1]
        assert chosen.finite == [True]


def test_extreme_temperatures_are_greedy_and_even():
    logits = make_logits(1)
    cold = sampler_of(drawn(temperature=1e-300)).probabilities(logits, [0])
    assert cold[0, logits.argmax()] == 1
    hot = sampler_of(drawn(temperature=1e300)).probabilities(logits, [0])
    assert torch.allclose(hot, torch.full_like(hot, 1 / SIZE))


def test_logprobs_are_those_of_the_plain_model():
    settings = [
        Sampling(logprobs=3, repetition_penalty=5.0, logit_bias={9: 50.0}),
        Sampling(),
        drawn(logprobs=0, top_k=1),
    ]
    sampler, logits = sampler_of(*settings), make_logits(3)
    chosen = sampler.choose(logits, range(3), [0] * 3)
    plain = logits.double().log_softmax(dim=-1)
    first, second, third = chosen.logprobs
    assert first is not None
    assert first.token == chosen.tokens[0] == 9
    assert first.logprob == pytest.approx(float(plain[0, 9]), abs=1e-5)
    assert second is None
    assert chosen.alternatives[1] is None
    assert third is not None
    assert third.logprob == pytest.approx(float(plain[2, third.token]), abs=1e-5)
    values, ids = plain[0].topk(3)
    found = chosen.alternatives[0]
    assert found is not None
    assert [each.token for each in found] == ids.tolist()
    assert [each.logprob for each in found] == pytest.approx(values.tolist(), abs=1e-5)
    assert chosen.alternatives[2] == ()


def test_a_row_is_given_anew_without_its_past():
    sampler, logits = sampler_of(Sampling(frequency_penalty=2.0, logit_bias={1: 3.0}, logprobs=1)), make_logits()
    sampler.note(0, 4)
    sampler.clear(0)
    sampler.note(0, 4)
    sampler.set(0, Sampling(), [1])
    assert torch.equal(sampler.scores(logits, [0]), logits)
    assert sampler.choose(logits, [0], [0]).logprobs == [None]
    sampler.set(0, Sampling(presence_penalty=1.0), [1])
    assert torch.equal(sampler.scores(logits, [0]), logits)


def test_a_bias_outside_the_vocabulary_is_refused():
    message = r"logit_bias: token 300 is out of range \(vocabulary of 300 tokens: 0\.\.299\)"
    with pytest.raises(RefoldError, match=message):
        sampler_of(Sampling(logit_bias={300: 1.0}))


def test_a_draw_takes_any_weights():
    sampler = sampler_of(drawn(seed=3))
    weights = torch.zeros(1, SIZE, dtype=torch.float64)
    weights[0, [4, 290]] = torch.tensor([1.0, 3.0], dtype=torch.float64)
    tokens = [int(sampler.draw(weights, [0], [place], RandomStream.DRAFT)) for place in range(400)]
    assert set(tokens) == {4, 290}
    assert 250 < tokens.count(290) < 350
