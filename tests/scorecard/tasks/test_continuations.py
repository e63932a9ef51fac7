"""Contexts that run once, beside one forward pass for each continuation."""

from typing import Any

import pytest
import torch

from refold.conversion.convert import ConvertOptions, convert
from refold.conversion.quantise import quantise
from refold.modeling.load import load_model
from refold.scorecard.tasks import continuations
from refold.scorecard.tasks.continuations import AnswerTokens, score_continuations

RELAXED = {"fold": {"loops": 2}, "relax": {"rank": 3, "init": "svd", "vectors": "own"}}
CASES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "source": ("llama", None),
    "windowed source": ("mistral-window", None),
    "local and global source": ("gemma3_text", None),
    "fold": ("llama", RELAXED),
    "windowed fold": ("mistral-window", RELAXED),
    "soft-capped fold": ("gemma2", RELAXED),
    "recurrent": ("llama", {"mixers": [{"type": "gated_deltanet", "transfer": "all"}]}),
    "hybrid": ("llama", {"mixers": [{"type": "mamba2", "depths": [1, 2], "transfer": "all"}]}),
    "linear and window": ("llama", {"mixers": [{"type": "linear_attention", "window": 5, "depths": [0, 2]}]}),
}


def questions() -> list[AnswerTokens]:
    """Contexts of several lengths with answers of several lengths, among them equal ones and beginnings of others."""
    generator = torch.Generator().manual_seed(3)

    def draw(count: int) -> list[int]:
        return torch.randint(2, 95, (count,), generator=generator).tolist()

    found = []
    for length in (9, 12, 13, 13, 25, 31, 2, 1):
        context = draw(length)
        answers = [draw(count) for count in (1, 1, 4, 7)]
        answers += [answers[-1][:3], answers[0], [*answers[2][:-1], 5]]
        found += [AnswerTokens(context + answer, len(answer)) for answer in answers]
    shared, ending = draw(20), draw(5)
    # Two contexts and one continuation, as in WinoGrande.
    found += [AnswerTokens(shared + draw(3) + ending, len(ending)) for _ in range(2)]
    order = torch.randperm(len(found), generator=generator).tolist()
    return [found[index] for index in order]


@torch.no_grad()
def one_by_one(model: Any, wanted: list[AnswerTokens]) -> list[tuple[float, bool]]:
    """The definition: all logits of each text, without cache or batch."""
    found = []
    for tokens, count in wanted:
        logits = model(torch.tensor([list(tokens)])).logits[0, -count - 1 : -1].double()
        aims = torch.tensor(tokens[-count:])
        found.append((float(logits.log_softmax(-1)[range(count), aims].sum()), bool((logits.argmax(-1) == aims).all())))
    return found


def farthest(scores: Any, wanted: list[tuple[float, bool]]) -> float:
    return max(abs(one - two) / abs(two) for (one, _), (two, _) in zip(scores, wanted, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_shared_context_gives_what_one_by_one_gives(case, make_source, tmp_path):
    variant, recipe = CASES[case]
    folder = make_source(variant)
    if recipe is not None:
        convert(folder, tmp_path / "fold", recipe, options=ConvertOptions(allow_larger=True))
        folder = tmp_path / "fold"
    # Recurrent states are float32 in every dtype.
    model = load_model(folder, device="cpu").double()
    wanted = questions()
    expected = one_by_one(model, wanted)
    scores = score_continuations(model, wanted, batch_tokens=150)
    assert farthest(scores, expected) < 2e-5
    assert [score.is_greedy for score in scores] == [is_greedy for _, is_greedy in expected]


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_quantised_weights_too(to, make_source, tmp_path):
    convert(make_source("llama"), tmp_path / "fold", RELAXED, options=ConvertOptions(allow_larger=True))
    quantise(tmp_path / "fold", tmp_path / "small", to)
    # In float32 a kernel for few rows rounds activations to bfloat16, and the two ways have different numbers of rows.
    model = load_model(tmp_path / "small", device="cpu").double()
    wanted = questions()
    assert farthest(score_continuations(model, wanted), one_by_one(model, wanted)) < 2e-5


def test_contexts_run_once(make_source, monkeypatch):
    model: Any = load_model(make_source("llama"), device="cpu")
    seen = []
    stack = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **given: seen.append(given["input_ids"]) or stack(**given))
    context = list(range(2, 42))
    wanted = [AnswerTokens([*context, 50 + choice, 60, 61], 3) for choice in range(4)]
    score_continuations(model, wanted)
    # All of the context but its last token, then this token and the answers without their last one.
    assert [tuple(ids.shape) for ids in seen] == [(1, 39), (4, 3)]
    seen.clear()
    score_continuations(model, wanted, least_shared=None)
    assert [tuple(ids.shape) for ids in seen] == [(4, 42)]


def test_answers_that_differ_in_their_last_token_need_one_row(make_source, monkeypatch):
    model: Any = load_model(make_source("llama"), device="cpu")
    seen = []
    stack = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **given: seen.append(given["input_ids"]) or stack(**given))
    wanted = [AnswerTokens([*range(2, 12), letter], 1) for letter in (20, 21, 22, 23)]
    expected = one_by_one(load_model(make_source("llama"), device="cpu"), wanted)
    assert farthest(score_continuations(model, wanted), expected) < 2e-5
    assert [tuple(ids.shape) for ids in seen] == [(1, 10)]


def test_a_cache_of_the_wrong_context_is_seen(make_source, monkeypatch):
    model = load_model(make_source("llama"), device="cpu")
    wanted = questions()
    expected = one_by_one(model, wanted)
    assert farthest(score_continuations(model, wanted), expected) < 1e-4
    run = continuations._run

    def exchanged(model: Any, batch: Any) -> Any:
        return run(model, batch._replace(groups=[*batch.groups[1:], batch.groups[0]]))

    monkeypatch.setattr(continuations, "_run", exchanged)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        assert farthest(score_continuations(model, wanted), expected) < 1e-4


def test_progress_reaches_the_number_of_continuations(make_source):
    told: list[tuple[int, int]] = []
    wanted = questions()
    model = load_model(make_source("llama"), device="cpu")
    score_continuations(model, wanted, batch_tokens=60, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (len(wanted), len(wanted))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert score_continuations(model, []) == []


def test_batches_hold_at_most_their_tokens():
    rows = continuations._rows(questions())
    for least_shared in (None, 1, 8):
        groups = continuations._groups(rows, least_shared)
        assert sum(len(group.rows) for group in groups) == len(rows)
        for batch in continuations._batches(groups, 100):
            members = [row for group in batch.groups for row in group.rows]
            for group in batch.groups:
                assert {row.tokens[: batch.cut] for row in group.rows} == {group.rows[0].tokens[: batch.cut]}
                assert all(batch.cut <= row.start for row in group.rows)
            longest = max(len(row.tokens) for row in members) - batch.cut
            tokens = len(batch.groups) * batch.cut + len(members) * longest
            assert tokens <= 100 or len(batch.groups) == 1
