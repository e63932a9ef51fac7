"""Requests of an engine: bad input, broken rows, samples, choices, streams and cancels."""

import asyncio
import copy
from collections import Counter

import pytest
import torch

from refold.engine.engine import Engine
from refold.engine.exits import ExitRule
from refold.engine.page_keeper import LocalKeeper
from refold.engine.settings import Drafts, EngineSettings
from refold.engine.streaming import StreamingEngine
from refold.errors import RefoldError
from refold.generation.sampling import Sampling
from refold.modeling.load import load_tokenizer
from tests.engine.conftest import greedy, make_prompts, options


def make(model, **given) -> Engine:
    return Engine(model, EngineSettings(**options(**given)))


def short(count: int = 8, **given) -> Sampling:
    return Sampling(max_new_tokens=count, ignore_eos=True, **given)


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([], "at least one token is required"),
        ([5, 96], "token"),
        ([-1], "token"),
        ([3] * 400, "must be at most"),
        ("text", "token ids are required"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(load, prompt, match):
    engine = make(load("strict"))
    with pytest.raises(RefoldError, match=match):
        engine.generate([[3, 4], prompt], short())
    assert not engine.has_work


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"weights": "int5"}, "weights"),
        ({"policy": "best"}, "policy"),
        ({"kv": "none"}, "kv"),
        ({"page_size": 0}, "page_size: at least 1"),
        ({"chunk": 2}, "chunk: at least max_rows"),
        ({"memory": 8}, "memory: at least"),
        ({"max_context": 10**6}, "max_context: must be at most"),
        ({"drafts": Drafts(depth=9)}, r"drafts.depth: must lie in 1\.\.3"),
        ({"exits": "calibrated"}, "calibrate"),
    ],
)
def test_settings_that_do_not_fit_are_refused(load, given, match):
    with pytest.raises(RefoldError, match=match):
        make(load("strict"), **given)


def test_a_stack_without_exits_and_loops_has_no_depth_to_draft(load):
    with pytest.raises(RefoldError, match="a stack without exits and loops"):
        make(load("source"), drafts=Drafts())


def test_keys_behind_the_exit_refuse_the_policy_without_any(load):
    with pytest.raises(RefoldError, match="kv: no keys and states behind the first exit"):
        make(load("exits"), exits=ExitRule("top1", {2: 0.5}), kv="shared")


def test_memory_for_less_than_one_request_is_said_before_it_runs(load):
    full = make(load("strict")).statistics().memory_bytes
    engine = make(load("strict"), memory=full // 40)
    with pytest.raises(RefoldError, match="memory: pages for the 38 tokens"):
        engine.generate([[5] * 30], short())
    assert len(engine.generate([[5] * 4], short(4))) == 1


def test_a_full_queue_refuses_and_disturbs_nobody(load):
    engine = make(load("strict"), max_queue=1, max_rows=1, chunk=8)
    first, second, third = (engine.prepare(prompt, short(3)) for prompt in make_prompts((3, 4, 5)))
    engine.submit(first)
    engine.step()
    engine.submit(second)
    with pytest.raises(RefoldError, match="max_queue: at most 1"):
        engine.submit(third)
    while engine.has_work:
        engine.step()
    assert [each.choices[0].reason for each in (first, second)] == ["length", "length"]


def test_a_row_that_is_not_finite_ends_alone(load):
    model = copy.deepcopy(load("strict"))
    broken, *others = make_prompts((6, 9, 11))
    broken[2] = 95
    model.model.embed_tokens.weight.data[95] = float("nan")
    others = [[token if token != 95 else 7 for token in prompt] for prompt in others]
    engine = make(model, max_rows=3)
    found = engine.generate([broken, *others], short())
    assert found[0].choices[0].reason == "error"
    assert "finite predictions are required" in str(found[0].choices[0].error)
    assert [list(each.choices[0].token_ids) for each in found[1:]] == [greedy(model, each, 8) for each in others]
    # Its pages are clean: later rows that get them are not poisoned.
    again = engine.generate([*others, *others], short())
    assert {each.choices[0].reason for each in again} == {"length"}


def test_a_finished_request_can_be_cancelled(load):
    engine = make(load("strict"))
    request = engine.prepare([3, 4, 5], short(2))
    engine.submit(request)
    while engine.has_work:
        engine.step()
    engine.cancel(request)
    assert request.choices[0].reason == "length"


def test_samples_repeat_whatever_runs_beside_them(load):
    model, (prompt, *others) = load("relaxed"), make_prompts((7, 12, 5, 9))
    sampling = short(12, temperature=1.0, seed=4)
    alone = make(model).generate([prompt], sampling)[0].choices[0].token_ids
    beside = make(model).generate([*others, prompt], [*([short(9, temperature=0.7)] * 3), sampling])
    assert beside[3].choices[0].token_ids == alone
    assert make(model).generate([prompt], short(12, temperature=1.0, seed=5))[0].choices[0].token_ids != alone


@pytest.mark.parametrize("drafts", [None, Drafts(tokens=3, adapt=False), Drafts("lookup", tokens=3, adapt=False)])
def test_samples_have_the_frequencies_of_the_softmax(load, drafts):
    """Second tokens too, which drafts decide: their frequencies given the first one are those of the model."""
    model, prompt, count = load("exits"), make_prompts((6,))[0], 2000
    sampling = [short(2, temperature=0.6, top_k=6, seed=seed) for seed in range(count)]
    found = make(model, drafts=drafts, max_rows=100, chunk=400).generate([prompt] * count, sampling)
    pairs = Counter(each.choices[0].token_ids for each in found)

    def distribution(ids):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double() / 0.6
        top = logits.topk(6)
        return dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))

    statistic, cells = 0.0, 0
    for first, share in distribution(prompt).items():
        for second, further in distribution([*prompt, first]).items():
            expected = count * share * further
            if expected >= 5:
                statistic += (pairs[first, second] - expected) ** 2 / expected
                cells += 1
    # Mean `cells`, standard deviation sqrt(2 cells): seven of them are beyond chance.
    assert cells > 8
    assert statistic < cells + 7 * (2 * cells) ** 0.5


def test_logprobs_are_those_of_a_plain_pass(load):
    model, prompt = load("own vectors"), make_prompts((9,))[0]
    choice = make(model).generate([prompt], short(6, logprobs=3))[0].choices[0]
    text = list(prompt)
    assert choice.logprobs is not None
    assert choice.alternatives is not None
    for token, told, alternatives in zip(choice.token_ids, choice.logprobs, choice.alternatives, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([text])).logits[0, -1].log_softmax(-1)
        assert told.token == token
        assert told.logprob == pytest.approx(float(expected[token]), abs=1e-5)
        assert [each.token for each in alternatives] == expected.topk(3).indices.tolist()
        text.append(token)


def test_choices_share_the_prompt_and_differ(load):
    engine = make(load("relaxed"))
    (prompt,) = make_prompts((13,))
    result = engine.generate([prompt], short(10, temperature=1.5, n=3))[0]
    assert len({each.token_ids for each in result.choices}) == 3
    assert engine.statistics().running == 0


@pytest.fixture(scope="module")
def with_text(make_model):
    folder = make_model()
    return folder, load_tokenizer(folder)


def test_texts_stop_at_a_string(with_text):
    folder, tokenizer = with_text
    engine = Engine(folder, EngineSettings(**options()), device="cpu")
    whole = engine.generate("The sea was calm", short(24))[0].text
    stop = whole[5:8]
    found = engine.generate("The sea was calm", short(24, stop=stop))[0].choices[0]
    assert (found.text, found.reason, found.stop) == (whole[: whole.index(stop)], "stop", stop)
    never = engine.generate("The sea was calm", short(24, stop="\u2603"))[0].choices[0]
    assert (never.text, never.reason) == (whole, "length")
    assert tokenizer.decode(list(never.token_ids), skip_special_tokens=True) == whole


def test_streams_join_to_the_text_and_leaving_one_cancels_it(with_text):
    folder, _ = with_text
    prompts = ["The sea", "A man", "Over the hills", "It was"]
    expected = [
        each.text for each in Engine(folder, EngineSettings(**options()), device="cpu").generate(prompts, short(20))
    ]
    engine = Engine(folder, EngineSettings(**options()), device="cpu")

    async def run():
        async with StreamingEngine(engine) as streaming:

            async def take(prompt):
                return [piece.text async for piece in streaming.stream(prompt, short(20))]

            async def leave():
                async for _ in streaming.stream("Never mind", short(60)):
                    break

            texts, _ = await asyncio.gather(asyncio.gather(*map(take, prompts)), leave())
            with pytest.raises(RefoldError, match="must be at most"):
                await streaming.answer([3] * 900, short())
            for _ in range(200):
                if not engine.has_work:
                    break
                await asyncio.sleep(0.01)
            return ["".join(pieces) for pieces in texts]

    assert asyncio.run(run()) == expected
    report = engine.statistics()
    assert (report.running, report.waiting, report.used_pages) == (0, 0, 0)


def test_keys_of_the_wrong_loop_are_caught(load):
    """The comparison with `generate` must see an exchange of the loops' keys."""
    model, (prompt,) = load("relaxed"), make_prompts((17,))
    engine = make(model)
    keeper = engine._pools.keeper
    assert isinstance(keeper, LocalKeeper)
    keys = keeper.keys
    keys[0] = keys[2]
    assert list(engine.generate([prompt], short(12))[0].choices[0].token_ids) != greedy(model, prompt, 12)


def test_a_lora_of_the_wrong_loop_is_caught(load):
    model, (prompt,) = copy.deepcopy(load("relaxed")), make_prompts((17,))
    expected = greedy(model, prompt, 12)
    engine = make(model)
    first, third = model.model.depths[0], model.model.depths[2]
    first.lora, third.lora = third.lora, first.lora
    assert list(engine.generate([prompt], short(12))[0].choices[0].token_ids) != expected


def test_keys_that_skipped_depths_lack_are_caught(load, monkeypatch):
    model, (prompt,) = load("exits"), make_prompts((15,))
    rule = ExitRule("top1", {}, lambda index, place: 4 if place % 3 == 2 else 2)
    kept = make(model, exits=rule, kv="propagate", max_pending=99).generate([prompt], short(12))[0].choices[0]
    monkeypatch.setattr("refold.engine.launch.Launch.fill", lambda self, depths: None)
    lacking = make(model, exits=rule, kv="propagate", max_pending=99).generate([prompt], short(12))[0].choices[0]
    assert kept.depths == lacking.depths
    assert kept.token_ids != lacking.token_ids


def test_rows_wait_no_longer_than_the_bound(load):
    model = load("three loops")
    engine = make(model, max_wait=3, max_rows=4, policy="coda", min_coda=3)
    requests = [engine.prepare(prompt, short(10)) for prompt in make_prompts((3, 9, 14, 6, 8, 11))]
    for request in requests:
        engine.submit(request)
        engine.step()
    while engine.has_work:
        engine.step()
    assert engine.statistics().longest_wait <= 3 + 4
    begun = [each.begun for each in requests if each.begun is not None]
    assert len(begun) == len(requests)
    assert begun == sorted(begun)
