"""Recall: a model that looks back is right, one that cannot is not, and figures are those of a plain loop."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refold.scorecard.job import ScoreJob, SectionNotRun
from refold.scorecard.recall.answers import score_answers
from refold.scorecard.recall.associative import make_associative
from refold.scorecard.recall.copying import make_copying
from refold.scorecard.recall.item import RecallItem
from refold.scorecard.recall.measure import measure_recall
from refold.scorecard.recall.passkey import PasskeyText, make_passkey
from refold.scorecard.recall.word_pool import WordPool, find_words
from refold.scorecard.record import RecallScore, RecallSection

LENGTHS = (96, 192)


@pytest.fixture(scope="module")
def pool(shipped_tokenizer: Any) -> WordPool:
    return find_words(shipped_tokenizer, 10**6)


@pytest.fixture(scope="module")
def made(pool: WordPool, shipped_tokenizer: Any) -> list[RecallItem]:
    text = PasskeyText.of(shipped_tokenizer)
    cells = [make_associative(pool, 96, 3, 0), make_copying(pool, 97, 3, 0)]
    cells += [make_passkey(pool, text, 192, depth, 2, 0) for depth in (0.0, 0.5, 1.0)]
    return [item for cell in cells if not isinstance(cell, str) for item in cell.items]


def scores(section: RecallSection, kind: str) -> list[RecallScore]:
    return [each for each in section.scores if each.kind == kind]


def test_words_are_whole_single_tokens(pool: WordPool, shipped_tokenizer: Any) -> None:
    assert len(pool.words) > 300
    for token in pool.words[::37].tolist():
        word = shipped_tokenizer.decode([token])
        assert word[0] == " "
        assert word[1:].isalpha()
        assert shipped_tokenizer.encode(word, add_special_tokens=False) == [token]


def test_a_vocabulary_without_words_gives_other_tokens(make_model: Callable[..., Path]) -> None:
    from refold.modeling.load import load_tokenizer

    tokenizer = load_tokenizer(make_model("llama"))
    found = find_words(tokenizer, 300)
    assert len(found.words) >= 200
    assert not set(found.words.tolist()) & set(tokenizer.all_special_ids)
    assert find_words(None, 96).words.tolist() == list(range(3, 96))


def test_every_answer_was_told_after_the_same_token(made: list[RecallItem]) -> None:
    for item in made:
        assert item.is_mention is not None
        assert item.is_answer.sum() == item.is_mention.sum() > 0
        assert np.flatnonzero(item.is_mention).max() < np.flatnonzero(item.is_answer).min()
        before = item.tokens[np.flatnonzero(item.is_mention) - 1], item.tokens[item.is_mention]
        after = item.tokens[np.flatnonzero(item.is_answer) - 1], item.tokens[item.is_answer]
        pairs = {tuple(pair) for pair in np.stack(before, 1).tolist()}
        assert pairs == {tuple(pair) for pair in np.stack(after, 1).tolist()}


def test_items_have_exactly_their_length(pool: WordPool, shipped_tokenizer: Any) -> None:
    text = PasskeyText.of(shipped_tokenizer)
    for length in range(150, 154):
        for cell in (
            make_associative(pool, length, 1, 0),
            make_copying(pool, length, 1, 0),
            make_passkey(pool, text, length, 0.3, 1, 0),
        ):
            assert not isinstance(cell, str)
            assert len(cell.items[0].tokens) == len(cell.items[0].is_answer) == length


def test_a_needle_stands_at_its_depth(pool: WordPool, shipped_tokenizer: Any) -> None:
    text, places = PasskeyText.of(shipped_tokenizer), []
    for depth in (0.0, 0.5, 1.0):
        cell = make_passkey(pool, text, 400, depth, 1, 0)
        assert not isinstance(cell, str)
        is_mention = cell.items[0].is_mention
        assert is_mention is not None
        places.append(int(np.flatnonzero(is_mention)[0]))
    assert places[0] < 40
    assert places[1] - places[0] == pytest.approx((places[2] - places[0]) / 2, abs=1)
    assert places[2] > 340


def test_a_model_that_looks_back_recalls_everything(
    make_looking_back: Callable[..., Any], make_job: Callable[..., ScoreJob], shipped_tokenizer: Any
) -> None:
    job = make_job(
        make_looking_back(len(shipped_tokenizer)), None, shipped_tokenizer, recall_lengths=LENGTHS, recall_items=2
    )
    found = measure_recall(job)
    assert {each.kind for each in found.scores} == {"associative", "copying", "passkey"}
    for each in found.scores:
        assert each.accuracy == each.exact == 1.0, each
        assert each.error == 0.0
        assert each.gain is not None
        assert each.gain > 5
    assert "verbatim: skipped, because no text is given" in found.notes


def test_a_short_reach_loses_what_is_far(
    make_looking_back: Callable[..., Any], make_job: Callable[..., ScoreJob], shipped_tokenizer: Any
) -> None:
    model = make_looking_back(len(shipped_tokenizer), reach=60)
    job = make_job(model, None, shipped_tokenizer, recall_lengths=LENGTHS, recall_items=2)
    found = measure_recall(job)
    short, long = scores(found, "copying")
    assert short.accuracy == 1.0
    assert long.accuracy == 0.0
    by_depth = {each.depth: each.accuracy for each in scores(found, "passkey") if each.length == 192}
    assert by_depth == {0.0: 0.0, 0.5: 0.0, 1.0: 1.0}


def test_answers_of_other_items_are_at_chance(
    pool: WordPool, make_looking_back: Callable[..., Any], shipped_tokenizer: Any
) -> None:
    cell = make_associative(pool, 256, 6, 0)
    assert not isinstance(cell, str)
    numbers = np.random.default_rng(0)
    shuffled = []
    for item in cell.items:
        tokens = item.tokens.copy()
        tokens[item.is_answer] = numbers.permutation(tokens[item.is_answer])
        shuffled.append(replace(item, tokens=tokens))
    model = make_looking_back(len(shipped_tokenizer))
    assert score_answers(model, cell.items).right.mean() == 1.0
    # One of 63 values of the item is right by luck.
    assert score_answers(model, shuffled).right.mean() == pytest.approx(1 / 63, abs=0.03)


def test_scores_equal_a_plain_loop(
    make_model: Callable[..., Path], make_job: Callable[..., ScoreJob], pool: WordPool
) -> None:
    job = make_job(make_model("llama"))
    small = find_words(job.subject.tokenizer, 300)
    cells = [make_associative(small, 64, 5, 1), make_copying(small, 61, 5, 1)]
    for cell in cells:
        assert not isinstance(cell, str)
        found = score_answers(job.subject.model, cell.items)
        assert found.gain is not None
        for number, item in enumerate(cell.items):
            with torch.no_grad():
                logits = job.subject.model(input_ids=torch.from_numpy(item.tokens)[None]).logits[0].double()
            right, nll = [], {"answer": [], "mention": []}
            assert item.is_mention is not None
            for place in range(1, len(item.tokens)):
                token, row = int(item.tokens[place]), logits[place - 1]
                loss = float(row.logsumexp(0) - row[token])
                if item.is_answer[place]:
                    right.append(int(row.argmax()) == token)
                    nll["answer"].append(loss)
                if item.is_mention[place]:
                    nll["mention"].append(loss)
            assert found.right[number] == pytest.approx(np.mean(right))
            assert found.gain[number] == pytest.approx(np.mean(nll["mention"]) - np.mean(nll["answer"]), abs=1e-4)


def test_items_depend_on_the_seed_and_not_on_the_other_lengths(pool: WordPool) -> None:
    one, same, other = (make_copying(pool, 80, 2, seed) for seed in (0, 0, 1))
    assert [each.tokens.tolist() for each in one.items] == [each.tokens.tolist() for each in same.items]
    assert one.items[0].tokens.tolist() != other.items[0].tokens.tolist()
    # More items begin with the same ones.
    assert make_copying(pool, 80, 3, 0).items[0].tokens.tolist() == one.items[0].tokens.tolist()


def test_verbatim_continuation_is_greedy_decoding(
    make_model: Callable[..., Path], make_job: Callable[..., ScoreJob], texts: list[str]
) -> None:
    folder = make_model("llama")
    job = make_job(folder, texts, recall_lengths=(), documents=4)
    (plain,) = measure_recall(job).scores
    assert plain.kind == "verbatim"
    assert plain.num_items == len(set(plain.items)) == 4
    assert plain.chance is plain.gain is None
    assert plain.exact == 0.0
    short = measure_recall(make_job(folder, ["A short text, and no more."], recall_lengths=(32,), recall_items=1))
    assert any("a document of at least 100 tokens is required" in note for note in short.notes)
    # A text that the model itself has written is continued to the last token.
    tokenizer: Any = job.subject.tokenizer
    prompt = tokenizer.encode(texts[0], add_special_tokens=False)[:49]
    model: Any = job.subject.model
    start = torch.tensor([[tokenizer.bos_token_id, *prompt]])
    written = model.generate(input_ids=start, max_new_tokens=50, do_sample=False)[0].numpy()
    item = RecallItem(written, np.arange(100) >= 50)
    assert score_answers(model, [item]).exact.tolist() == [1.0]
    written[70] = (written[70] + 1) % 300
    found = score_answers(model, [item])
    assert found.exact.tolist() == [0.0]
    assert found.right[0] < 1


def test_lengths_beyond_the_positions_are_named(
    make_looking_back: Callable[..., Any], make_job: Callable[..., ScoreJob], shipped_tokenizer: Any
) -> None:
    model = make_looking_back(len(shipped_tokenizer), positions=100)
    job = make_job(model, None, shipped_tokenizer, recall_lengths=(96, 512), recall_items=1)
    found = measure_recall(job)
    assert {each.length for each in found.scores} == {96}
    assert "512 tokens: skipped, because the model has 100 positions" in found.notes
    job = make_job(model, None, shipped_tokenizer, recall_lengths=(512,))
    with pytest.raises(SectionNotRun, match=r"a length within the model's positions is required \(512 tokens"):
        measure_recall(job)


def test_too_few_words_are_named(make_looking_back: Callable[..., Any], make_job: Callable[..., ScoreJob]) -> None:
    job = make_job(make_looking_back(96), recall_lengths=(64, 256), recall_items=2)
    found = measure_recall(job)
    assert "associative, 256 tokens: 64 keys are required (the vocabulary has 46 words for them)" in found.notes
    assert "passkey: skipped, because the model has no tokenizer" in found.notes
    assert [each.length for each in scores(found, "associative")] == [64]
