import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from refold.engine.acceptance import Accepted, accept_drafts, lookup_draft
from refold.engine.randomness import RandomStream
from refold.engine.sampler import Sampler
from refold.generation.sampling import Sampling

SIZE = 12
DRAWS = 8_000
BATCH = 500
WAYS = [{}, {"temperature": 0.6}, {"top_p": 0.85}, {"top_k": 5, "min_p": 0.02}]


def make_logits(*shape: int, seed: int = 0, size: int = SIZE) -> Tensor:
    return 1.5 * torch.randn(*shape, size, generator=torch.Generator().manual_seed(seed))


def sampler_of(settings: list[Sampling], size: int = SIZE) -> Sampler:
    sampler = Sampler(size, len(settings))
    for row, each in enumerate(settings):
        sampler.set(row, each, [1])
    return sampler


def drawn(**settings) -> Sampling:
    return Sampling(**{"temperature": 1.0, **settings})


def exceeds(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Whether counts differ from probabilities by a chi-square beyond five deviations."""
    expected = probabilities * counts.sum()
    cells = expected >= 5
    pairs = [*zip(counts[cells], expected[cells], strict=True), (counts[~cells].sum(), expected[~cells].sum())]
    pairs = [(have, want) for have, want in pairs if want >= 1]
    freedom = len(pairs) - 1
    statistic = sum((have - want) ** 2 / want for have, want in pairs)
    return statistic > freedom + 5 * math.sqrt(2 * freedom)


def speculate(way: dict, wrong: bool = False) -> tuple[np.ndarray, np.ndarray, Tensor, Tensor]:
    """Counts of the first tokens and of pairs of two tokens, and the target's logits for them."""
    first, after = make_logits(1, seed=1), make_logits(SIZE, seed=2)
    draft_first, draft_after = make_logits(1, seed=3), make_logits(SIZE, seed=4)
    ones, twos = np.zeros(SIZE), np.zeros((SIZE, SIZE))
    for begin in range(0, DRAWS, BATCH):
        sampler = sampler_of([drawn(seed=begin + row, **way) for row in range(BATCH)])
        rows = list(range(BATCH))
        q1 = sampler.probabilities(draft_first.expand(BATCH, -1), rows)
        x1 = sampler.draw(q1, rows, [0] * BATCH, RandomStream.DRAFT)
        q2 = sampler.probabilities(draft_after[x1], rows)
        x2 = sampler.draw(q2, rows, [1] * BATCH, RandomStream.DRAFT)
        drafts, q = torch.stack((x1, x2), dim=1), torch.stack((q1, q2), dim=1)
        if wrong:
            q = q.roll(1, dims=-1)
        logits = torch.stack((first.expand(BATCH, -1), after[x1], after[x2]), dim=1)
        got = accept_drafts(sampler, logits, drafts, rows, [0] * BATCH, q)
        short = [row for row in rows if len(got.tokens[row]) == 1]
        # Rows with one token go on without drafts.
        last = [got.tokens[row][0] for row in short]
        second = sampler.choose(after[last], short, [1] * len(short)).tokens
        following = dict(zip(short, second, strict=True))
        for row in rows:
            tokens = [*got.tokens[row], following.get(row, 0)]
            ones[tokens[0]] += 1
            twos[tokens[0], tokens[1]] += 1
    return ones, twos, first, after


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_drafted_tokens_are_distributed_as_the_target(way: dict):
    ones, twos, first, after = speculate(way)
    sampler = sampler_of([drawn(**way)])
    p1 = sampler.probabilities(first, [0])[0].numpy()
    p2 = sampler.probabilities(after, [0] * SIZE).numpy()
    assert not exceeds(ones, p1)
    assert not exceeds(twos.reshape(-1), (p1[:, None] * p2).reshape(-1))


def test_a_wrong_draft_distribution_is_seen():
    ones, twos, first, after = speculate({}, wrong=True)
    sampler = sampler_of([drawn()])
    p1 = sampler.probabilities(first, [0])[0].numpy()
    p2 = sampler.probabilities(after, [0] * SIZE).numpy()
    assert exceeds(ones, p1)
    assert exceeds(twos.reshape(-1), (p1[:, None] * p2).reshape(-1))


@pytest.mark.parametrize("way", [{"temperature": 0.0}, *WAYS, {"frequency_penalty": 1.0}], ids=str)
@pytest.mark.parametrize("bonus", [True, False])
def test_without_probabilities_tokens_are_those_of_plain_sampling(way: dict, bonus: bool):
    rows, k, size = 40, 3, 40
    table = make_logits(size, seed=5, size=size)
    drafts = torch.randint(0, size, (rows, k), generator=torch.Generator().manual_seed(6))
    settings = [drawn(seed=row, **way) for row in range(rows)]
    plain = sampler_of(settings, size)
    current, expected = [1] * rows, []
    for place in range(k + 1):
        current = plain.choose(table[current], range(rows), [place] * rows).tokens
        for row, token in enumerate(current):
            plain.note(row, token)
        expected.append(current)
    # A third of the drafts is right in all places, a third in the first alone.
    for row in range(rows):
        right = (k, 1, 0)[row % 3]
        drafts[row, :right] = torch.tensor([each[row] for each in expected[:right]])
    context = torch.cat((torch.ones(rows, 1, dtype=torch.long), drafts), dim=1)[:, : k + bonus]
    got = accept_drafts(sampler_of(settings, size), table[context], drafts, range(rows), [0] * rows)
    for row in range(rows):
        assert got.tokens[row] == [each[row] for each in expected[: len(got.tokens[row])]]
        assert got.counts[row] >= (k, 1, 0)[row % 3]
        assert len(got.tokens[row]) == min(got.counts[row] + 1, k + bonus)
        assert (got.next_tokens[row] is None) == (got.counts[row] == k and not bonus)


def test_greedy_rows_take_no_notice_of_probabilities():
    logits, rows = make_logits(6, 3, seed=8), range(6)
    drafts = logits.argmax(dim=-1)[:, :2].clone()
    drafts[3:, 1] = (drafts[3:, 1] + 1) % SIZE
    q = torch.rand(6, 2, SIZE).softmax(dim=-1)
    settings = [Sampling() if row % 2 else drawn(seed=row) for row in rows]
    got = accept_drafts(sampler_of(settings), logits, drafts, rows, [0] * 6, q)
    best = logits.argmax(dim=-1).tolist()
    assert got.tokens[1] == best[1]
    assert got.tokens[3] == best[3][:2]
    assert (got.counts[1], got.counts[3]) == (2, 1)


def test_equal_distributions_accept_everything():
    rows = 200
    sampler = sampler_of([drawn(seed=row, top_p=0.9) for row in range(rows)])
    logits = make_logits(1, seed=9).expand(rows, 2, -1)
    q = sampler.probabilities(logits[:, 0], range(rows))
    drafts = sampler.draw(q, range(rows), [0] * rows, RandomStream.DRAFT)[:, None]
    got = accept_drafts(sampler, logits, drafts, range(rows), [0] * rows, q[:, None])
    assert got.counts == [1] * rows


def test_rows_with_fewer_drafts_are_padded():
    logits = make_logits(3, 4, seed=10)
    best = logits.argmax(dim=-1)
    drafts = best[:, :3].clone()
    drafts[0, 1:], drafts[1, :] = -1, -1
    for q in (None, torch.full((3, 3, SIZE), 1 / SIZE)):
        got = accept_drafts(sampler_of([Sampling()] * 3), logits, drafts, range(3), [0] * 3, q)
        assert got.counts == [1, 0, 3]
        assert got.tokens == [best[0, :2].tolist(), best[1, :1].tolist(), best[2].tolist()]
        plain = sampler_of([drawn(seed=row) for row in range(3)])
        got = accept_drafts(plain, logits, drafts, range(3), [0] * 3, q)
        assert got.next_tokens[1] == plain.choose(logits[1:2, 0], [1], [0]).tokens[0]


def test_a_place_that_is_not_finite_is_named_only_if_it_is_used():
    logits = make_logits(3, 3, seed=11)
    drafts = logits.argmax(dim=-1)[:, :2].clone()
    drafts[0, 0] = (drafts[0, 0] + 1) % SIZE
    logits[0, 1], logits[1, 1] = math.nan, math.nan
    got = accept_drafts(sampler_of([Sampling()] * 3), logits, drafts, range(3), [0] * 3)
    assert got.finite == [True, False, True]


def test_gaps_and_logprobs_come_for_each_new_token():
    logits = make_logits(2, 3, seed=12)
    drafts = logits.argmax(dim=-1)[:, :2]
    sampler = sampler_of([Sampling(logprobs=2), Sampling()])
    got: Accepted = accept_drafts(sampler, logits, drafts, [0, 1], [0, 0])
    values = logits.sort(dim=-1, descending=True).values
    assert got.gaps[0] == pytest.approx((values[0, :, 0] - values[0, :, 1]).tolist(), abs=1e-6)
    plain = logits.log_softmax(dim=-1)
    for place, token in enumerate(got.tokens[0]):
        found = got.logprobs[0][place]
        assert found is not None
        assert found.token == token
        assert found.logprob == pytest.approx(float(plain[0, place, token]), abs=1e-5)
        assert len(got.alternatives[0][place] or ()) == 2
    assert got.logprobs[1] == [None] * 3


@pytest.mark.parametrize(
    ("tokens", "k", "longest", "expected"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 3, 3, [9, 1, 2]),
        ([1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3], 2, 3, [9, 7]),
        ([1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3], 2, 2, [8, 1]),
        ([5, 5], 4, 3, [5, 5, 5, 5]),
        ([7, 1, 2, 1, 2], 5, 3, [1, 2, 1, 2, 1]),
        ([1, 2, 3], 4, 3, []),
        ([4], 4, 3, []),
        ([], 4, 3, []),
    ],
)
def test_the_last_longest_match_is_drafted(tokens: list[int], k: int, longest: int, expected: list[int]):
    assert lookup_draft(tokens, k, longest) == expected


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 5), st.integers(1, 4))
def test_drafts_are_those_of_a_plain_search(tokens: list[int], k: int, longest: int):
    expected: list[int] = []
    for length in range(min(longest, len(tokens) - 1), 0, -1):
        starts = [at for at in range(len(tokens) - length) if tokens[at : at + length] == tokens[-length:]]
        if starts:
            expected = (tokens[starts[-1] + length :] * k)[:k]
            break
    assert lookup_draft(tokens, k, longest) == expected
