"""The engine's tokens are those of transformers' `generate`, whatever the schedule."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refold.engine.engine import Engine
from refold.engine.exits import ExitRule
from refold.engine.settings import Drafts, EngineSettings
from refold.errors import RefoldError
from refold.generation.sampling import Sampling
from tests.engine.conftest import MODELS, greedy, make_prompts, options

NEVER, ALWAYS = 2.0, -1.0


def short(count: int = 8, **given: Any) -> Sampling:
    return Sampling(max_new_tokens=count, ignore_eos=True, **given)


def run(model: Any, prompts: list[list[int]], sampling: Any = None, **given: Any) -> list[list[int]]:
    engine = Engine(model, EngineSettings(**options(**given)))
    found = engine.generate(prompts, sampling or short())
    assert [each.choices[0].reason for each in found] == ["length"] * len(prompts)
    assert engine.statistics().running == 0
    return [list(each.choices[0].token_ids) for each in found]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_generate(load, name):
    model = load(name)
    prompts = make_prompts((1, 5, 9, 17, 23, 30))
    assert run(model, prompts) == [greedy(model, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("name", MODELS)
def test_packed_weights_give_the_same_tokens(load, name):
    model, prompts = load(name), make_prompts((5, 17, 30))
    assert run(model, prompts, weights="float32") == [greedy(model, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("name", ["relaxed", "hybrid", "window"])
@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 28), min_size=1, max_size=6),
    counts=st.lists(st.integers(1, 9), min_size=6, max_size=6),
    arrivals=st.lists(st.integers(0, 8), min_size=6, max_size=6),
    cancelled=st.sets(st.integers(0, 5), max_size=2),
    chunk=st.integers(4, 24),
    policy=st.sampled_from(("fullest", "coda", "oldest")),
    preemption=st.sampled_from(("recompute", "copy")),
)
def test_schedules_do_not_change_tokens(load, name, lengths, counts, arrivals, cancelled, chunk, policy, preemption):
    model, prompts = load(name), make_prompts(lengths)
    engine = Engine(
        model,
        EngineSettings(**options(chunk=chunk, policy=policy, preemption=preemption, min_coda=2)),
    )
    requests = [engine.prepare(prompt, short(count)) for prompt, count in zip(prompts, counts, strict=False)]
    step, ended = 0, []
    waiting = sorted(zip(arrivals, requests, strict=False), key=lambda each: each[0])
    while waiting or engine.has_work:
        while waiting and waiting[0][0] <= step:
            engine.submit(waiting.pop(0)[1])
        ended += engine.step()
        step += 1
        for index in cancelled:
            if step == 5 + index and index < len(requests):
                engine.cancel(requests[index])
        assert step < 2000
    for index, request in enumerate(requests):
        choice = request.choices.get(0)
        if choice is None:
            assert index in cancelled
            continue
        expected = greedy(model, request.prompt_ids, counts[index])
        if choice.reason == "cancelled":
            assert index in cancelled
            assert list(choice.token_ids) == expected[: len(choice.token_ids)]
        else:
            assert list(choice.token_ids) == expected


@pytest.mark.parametrize("name", ["exits", "exits first keys", "exits recurrent", "three loops"])
@pytest.mark.parametrize("measure", ["top1", "margin", "entropy"])
def test_exits_never_taken_are_the_full_depth(load, name, measure):
    model, prompts = load(name), make_prompts((3, 11, 20))
    rule = ExitRule(measure, dict.fromkeys((depth + 1 for depth in model.model.exit_depths), NEVER))
    assert run(model, prompts, exits=rule) == [greedy(model, prompt, 8) for prompt in prompts]


def test_a_gate_and_an_agreement_let_tokens_leave(load):
    model, prompts = load("exits"), make_prompts((3, 5))
    for threshold, depths in ((ALWAYS, {2}), (NEVER, {4})):
        engine = Engine(model, EngineSettings(**options(exits=ExitRule("gate", {2: threshold}), max_pending=99)))
        assert {depth for each in engine.generate(prompts, short()) for depth in each.choices[0].depths} == depths
    three = load("three loops")
    rule = ExitRule("agreement", {2: 0.5, 4: 0.5})
    found = Engine(three, EngineSettings(**options(exits=rule, max_pending=99))).generate(prompts, short(20))
    # The first exit has nothing to agree with.
    assert {depth for each in found for depth in each.choices[0].depths} <= {4, 6}


@pytest.mark.parametrize("kv", ["recompute", "propagate", "shared"])
@pytest.mark.parametrize("name", ["exits", "exits first keys", "exits recurrent", "three loops"])
def test_exits_always_taken_are_that_depth(load, name, kv):
    # Keys of prompts are never propagated, so only a prompt of one token leaves with its first token.
    model, prompts = load(name), make_prompts((1, 1, 1) if kv == "propagate" else (3, 11, 15))
    first = model.model.exit_depths[0] + 1
    rule = ExitRule("top1", {first: ALWAYS})
    if (kv == "shared") != (name == "exits first keys"):
        return
    if kv == "propagate" and name == "exits recurrent":
        with pytest.raises(RefoldError, match="use 'recompute'"):
            run(model, prompts, exits=rule, kv=kv)
        return
    engine = Engine(model, EngineSettings(**options(exits=rule, kv=kv, max_pending=99)))
    found = engine.generate(prompts, short())
    assert [list(each.choices[0].token_ids) for each in found] == [
        greedy(model, prompt, 8, exit_depth=first) for prompt in prompts
    ]
    assert {depth for each in found for depth in each.choices[0].depths} == {first}
    # Loops that are skipped do not run: only the first depths saw launches.
    assert engine.statistics().mean_depths == first


@pytest.mark.parametrize("name", ["exits", "exits first keys", "exits recurrent", "three loops"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_recomputed_keys_give_the_tokens_of_the_depths_that_were_run(load, name, share):
    """Every token equals the prediction of a plain forward pass at the depth where it left."""
    model, prompts = load(name), make_prompts((3, 11, 20, 7, 13))
    exits = [depth + 1 for depth in model.model.exit_depths]
    generator = torch.Generator().manual_seed(3)
    depths = [[*exits, model.config.num_hidden_layers][: len(exits) + 1] for _ in prompts]
    draws = torch.rand(len(prompts), 16, generator=generator)

    def replay(index: int, place: int) -> int:
        chosen = depths[index]
        return chosen[0] if draws[index, place] < share else chosen[1] if draws[index, place] < 0.8 else chosen[-1]

    engine = Engine(model, EngineSettings(**options(exits=ExitRule("top1", {}, replay), max_pending=99)))
    for prompt, result in zip(prompts, engine.generate(prompts, short(12)), strict=True):
        text = list(prompt)
        choice = result.choices[0]
        assert choice.depths == tuple(replay(result.index, place) for place in range(12))
        for token, depth in zip(choice.token_ids, choice.depths, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([text]), exit_depth=depth).logits[0, -1]
            assert int(logits.argmax()) == token
            text.append(token)


def drafting(name: str, adapt: bool) -> Any:
    # How many tokens are drafted is adapted alike for every stack.
    is_long = adapt and name not in ("exits", "exits recurrent")
    return pytest.param(name, adapt, marks=[pytest.mark.long] * is_long)


DRAFTING = ("exits", "strict", "exits first keys", "exits recurrent", "three loops", "recurrent")


@pytest.mark.parametrize("source", ["exit", "lookup"])
@pytest.mark.parametrize(("name", "adapt"), [drafting(name, adapt) for name in DRAFTING for adapt in (False, True)])
def test_drafts_change_no_greedy_token(load, name, source, adapt):
    model, prompts = load(name), make_prompts((3, 11, 20, 7, 13))
    drafts = Drafts(source=source, tokens=4, adapt=adapt)
    assert run(model, prompts, short(14), drafts=drafts) == [greedy(model, prompt, 14) for prompt in prompts]


@pytest.mark.parametrize("name", ["exits", "exits recurrent"])
def test_drafts_of_greedy_rows_beside_sampled_ones_change_no_token(load, name):
    model, prompts = load(name), make_prompts((3, 9, 14, 6))
    engine = Engine(model, EngineSettings(**options(drafts=Drafts(tokens=4, adapt=False))))
    requests = [
        engine.prepare(prompt, short(18, temperature=float(index % 2), seed=index))
        for index, prompt in enumerate(prompts)
    ]
    # A greedy row guesses alone at first, then beside rows that draw.
    for request in requests:
        engine.submit(request)
        for _ in range(3):
            engine.step()
    while engine.has_work:
        engine.step()
    for request in requests[::2]:
        assert list(request.choices[0].token_ids) == greedy(model, request.prompt_ids, 18)


@pytest.mark.parametrize("name", ["window", "window hybrid"])
def test_a_prompt_far_longer_than_the_window_passes_through_a_small_pool(load, name):
    model, (prompt,) = load(name), make_prompts((50,))
    given = {"max_rows": 1, "chunk": 8, "max_pending": 1, "share_prefixes": False}
    engine = Engine(model, EngineSettings(**options(**given)))
    request = engine.prepare(prompt, short(6))
    engine.submit(request)
    for _ in range(400):
        engine.step()
    assert list(request.choices[0].token_ids) == greedy(model, prompt, 6)
    assert engine.statistics().preemptions == 0


@pytest.mark.parametrize("preemption", ["recompute", "copy"])
def test_drafts_of_recurrent_rows_survive_preemption(load, preemption):
    model, prompts = load("exits recurrent"), make_prompts((9, 11, 14, 10))
    full = Engine(model, EngineSettings(**options())).statistics().memory_bytes
    drafts = Drafts(tokens=4, adapt=False)
    given = {"memory": full // 20, "preemption": preemption, "max_context": 40, "drafts": drafts, "max_rows": 3}
    engine = Engine(model, EngineSettings(**options(**given)))
    found = [list(each.choices[0].token_ids) for each in engine.generate(prompts, short(16))]
    assert found == [greedy(model, prompt, 16) for prompt in prompts]
    assert engine.statistics().preemptions > 0


@pytest.mark.parametrize("preemption", ["recompute", "copy"])
@pytest.mark.parametrize("name", ["relaxed", "window hybrid", "first keys"])
def test_a_pool_one_page_too_small_gives_the_same_tokens(load, name, preemption):
    model, prompts = load(name), make_prompts((9, 11, 14))
    large = Engine(model, EngineSettings(**options()))
    expected = [list(each.choices[0].token_ids) for each in large.generate(prompts, short(10))]
    bytes_needed = large.statistics().memory_bytes
    engine = Engine(model, EngineSettings(**options(memory=bytes_needed // 3, preemption=preemption, max_context=28)))
    found = [list(each.choices[0].token_ids) for each in engine.generate(prompts, short(10))]
    assert found == expected


def test_equal_prompts_share_pages(load):
    model = load("relaxed")
    prompt = make_prompts((21,))[0]
    engine = Engine(model, EngineSettings(**options()))
    first = engine.generate([prompt], short())[0]
    second = engine.generate([prompt], short())[0]
    assert (first.cached_tokens, second.cached_tokens) == (0, 20)
    assert first.choices == second.choices


@pytest.mark.parametrize(("join_loops", "num_segments"), [(None, 1), (True, 3)])
def test_loops_part_launches_only_where_it_is_asked(load, join_loops, num_segments):
    model, prompts = load("three loops"), make_prompts((5, 9))
    engine = Engine(model, EngineSettings(**options(join_loops=join_loops)))
    assert len(engine.passes.segments) == num_segments
    assert [list(each.choices[0].token_ids) for each in engine.generate(prompts, short())] == [
        greedy(model, prompt, 8) for prompt in prompts
    ]


def test_exit_depth_of_one_request(load):
    model, prompts = load("strict"), make_prompts((5, 9))
    sampling = [short(), short(exit_depth=3)]
    assert run(model, prompts, sampling) == [greedy(model, prompts[0], 8), greedy(model, prompts[1], 8, exit_depth=3)]
