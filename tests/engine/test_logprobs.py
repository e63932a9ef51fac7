"""Log-probabilities of prompts are those of a plain pass, in whatever pieces the prompt is read."""

import copy
import json

import pytest
import torch

from refold.engine import logprobs
from refold.engine.engine import Engine
from refold.engine.exits import ExitRule
from refold.engine.results import PromptLogprob, TokenLogprob
from refold.engine.settings import Drafts, EngineSettings
from refold.errors import RefoldError
from refold.generation.sampling import Sampling
from refold.serve.messages import ChoiceEnd, Ended, read_from_engine, write_line
from tests.engine.conftest import greedy, make_prompts, options


def make(model, **given) -> Engine:
    return Engine(model, EngineSettings(**options(**given)))


def scored(count=3, **given) -> Sampling:
    return Sampling(max_new_tokens=count, ignore_eos=True, **{"prompt_logprobs": 2, **given})


def require_plain(model, prompt, told, count=2, **given):
    """Compares with the logits of one forward pass."""
    with torch.no_grad():
        expected = model(torch.tensor([prompt]), **given).logits[0].log_softmax(-1)
    assert len(told) == len(prompt)
    assert told[0] is None
    for place, each in enumerate(told[1:], start=1):
        assert each.token == prompt[place]
        assert each.logprob == pytest.approx(float(expected[place - 1, prompt[place]]), abs=1e-4)
        assert [other.token for other in each.alternatives] == expected[place - 1].topk(count).indices.tolist()
        values = expected[place - 1].topk(count).values.tolist()
        assert [other.logprob for other in each.alternatives] == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("name", ["strict", "own vectors", "window", "exits recurrent"])
def test_prompts_are_scored_as_by_a_plain_pass(load, name, monkeypatch):
    """Prompts are longer than a launch, and the head runs for a few tokens at a time."""
    monkeypatch.setattr(logprobs, "_PIECE_BYTES", 5 * 2 * 4 * 96)
    model, prompts = load(name), make_prompts((41, 1, 19))
    found = make(model).generate(prompts, scored(2))
    for prompt, each in zip(prompts, found, strict=True):
        require_plain(model, prompt, each.prompt_logprobs)
        assert list(each.choices[0].token_ids) == greedy(model, prompt, 2)


def test_scored_prompts_run_again_though_their_prefix_is_shared(load):
    model, (prompt,) = load("strict"), make_prompts((30,))
    engine = make(model)
    plain = engine.generate([prompt], Sampling(max_new_tokens=2))[0]
    assert plain.prompt_logprobs is None
    again = engine.generate([prompt], scored())[0]
    assert again.cached_tokens == 0
    require_plain(model, prompt, again.prompt_logprobs)
    assert engine.generate([prompt], scored(prompt_logprobs=None))[0].cached_tokens > 0


def test_no_new_token_is_allowed_with_them_alone(load):
    model, prompts = load("strict"), make_prompts((12, 1))
    heard = []
    engine = make(model)
    full = [5] * engine.max_context
    requests = [engine.prepare(prompt, scored(0, n=2)) for prompt in (*prompts, full)]
    for request in requests:
        request.listener = heard.append
        engine.submit(request)
    while engine.has_work:
        engine.step()
    for prompt, request in zip((*prompts, full), requests, strict=True):
        result = engine.take(request)
        assert [(each.reason, each.token_ids, each.text) for each in result.choices] == [("length", (), "")] * 2
        assert len(result.prompt_logprobs or ()) == len(prompt)
    require_plain(model, prompts[0], requests[0].result().prompt_logprobs)
    assert sorted((each.choice, each.reason, each.token) for each in heard) == sorted(
        [(choice, "length", None) for choice in (0, 1)] * 3
    )
    assert engine.statistics().used_pages == 0
    with pytest.raises(RefoldError, match="max_new_tokens: at least 1 is required"):
        Sampling(max_new_tokens=0)
    with pytest.raises(RefoldError, match=r"prompt: must be at most \d+ tokens"):
        engine.prepare([5] * (engine.max_context + 1), scored(0))


@pytest.mark.parametrize(
    "given",
    [
        {"exits": ExitRule("top1", {2: 0.0}), "max_pending": 99},
        {"drafts": Drafts(tokens=3, adapt=False)},
        {"drafts": Drafts("lookup", tokens=3, adapt=False)},
    ],
)
def test_exits_and_drafts_leave_the_scores_of_prompts_as_they_are(load, given):
    model, prompts = load("exits"), make_prompts((21, 9))
    found = make(model, **given).generate(prompts, [scored(6), scored(6, n=2, temperature=1.0)])
    for prompt, each in zip(prompts, found, strict=True):
        require_plain(model, prompt, each.prompt_logprobs)
    if "exits" in given:
        assert found[0].choices[0].depths == (4, 2, 2, 2, 2, 2)
    at_exit = make(model).generate([prompts[0]], scored(2, exit_depth=2))[0]
    require_plain(model, prompts[0], at_exit.prompt_logprobs, exit_depth=2)


@pytest.mark.parametrize("preemption", ["recompute", "copy"])
def test_scores_survive_a_lack_of_memory(load, preemption):
    model, prompts = load("strict"), make_prompts((30, 28, 33))
    memory = make(model).statistics().memory_bytes // 18
    engine = make(model, memory=memory, preemption=preemption)
    found = engine.generate(prompts, scored(12))
    assert engine.statistics().preemptions
    for prompt, each in zip(prompts, found, strict=True):
        require_plain(model, prompt, each.prompt_logprobs)
        assert list(each.choices[0].token_ids) == greedy(model, prompt, 12)


def test_a_prompt_that_is_not_finite_ends_with_an_error(load):
    model = copy.deepcopy(load("strict"))
    model.model.embed_tokens.weight.data[95] = float("nan")
    found = make(model).generate([[5, 95, 7, 8], [5, 6, 7, 8]], scored(0))
    assert [each.choices[0].reason for each in found] == ["error", "length"]
    assert "in the prompt" in str(found[0].choices[0].error)


def test_messages_keep_them():
    told = (None, PromptLogprob(3, -0.5, (TokenLogprob(4, -0.25),)))
    ended = Ended(
        id=1, choices=(ChoiceEnd(reason="length", num_tokens=0),), cached_tokens=0, seconds={}, prompt_logprobs=told
    )
    assert read_from_engine(write_line(ended)) == ended
    assert json.loads(write_line(ended))["prompt_logprobs"][0] is None
