"""Noise: kinds and shares are those asked for, and losses are of the same clean tokens each time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refold.scorecard.job import ScoreJob, SectionNotRun
from refold.scorecard.noise import NO_CONTEXT, halve, measure_noise
from refold.scorecard.noisy_text import NOISES, make_noise, split_words
from refold.scorecard.openings import draw_texts

TEXT = "The old sailor looked at the calm sea, and he told his three daughters of 24 ships. " * 40


def noisy(kind: str, share: float, seed: int = 0) -> str:
    return make_noise(kind, TEXT, share, (seed, 0), ["whale", "rope"])


@pytest.mark.parametrize("kind", NOISES)
def test_noise_changes_its_share(kind: str) -> None:
    assert noisy(kind, 0.0) == TEXT
    assert noisy(kind, 0.1) == noisy(kind, 0.1) != noisy(kind, 0.1, seed=1)
    letters = sum(letter.isalpha() for letter in TEXT)
    found = noisy(kind, 0.1)
    if kind == "dropped letters":
        changed = (len(TEXT) - len(found)) / letters
    elif kind == "replaced words":
        words = split_words(found)
        assert len(words) == len(split_words(TEXT))
        changed = sum(one != other for one, other in zip(words, split_words(TEXT), strict=True)) / len(words)
    else:
        assert len(found) == len(TEXT)
        changed = sum(one != other for one, other in zip(found, TEXT, strict=True)) / letters
        # A swap changes two places, unless both letters are the same.
        changed /= 2 if kind == "swapped letters" else 1
    assert changed == pytest.approx(0.1, abs=0.04)


def test_noise_keeps_what_it_says() -> None:
    assert noisy("random case", 0.5).lower() == TEXT.lower()
    swapped = noisy("swapped letters", 0.5)
    assert sorted(swapped) == sorted(TEXT)
    assert [len(word) for word in split_words(swapped)] == [len(word) for word in split_words(TEXT)]
    assert set(split_words(noisy("replaced words", 1.0))) == {"whale", "rope"}
    assert not any(letter.isalpha() for letter in noisy("dropped letters", 1.0))
    # Changes of a small share are among those of a larger one.
    small, large = (noisy("random case", share) for share in (0.05, 0.2))
    assert all(one in (old, new) for one, old, new in zip(small, TEXT, large, strict=True))


@pytest.fixture(scope="module")
def job(make_model: Callable[..., Path], make_job: Callable[..., ScoreJob], texts: list[str]) -> ScoreJob:
    return make_job(make_model("llama"), texts, documents=3, opening=48, noise_shares=(0.0, 0.3))


def test_halves_are_cut_between_words(job: ScoreJob, texts: list[str]) -> None:
    tokenizer: Any = job.subject.tokenizer
    found = halve(texts[0], tokenizer, 48)
    assert found is not None
    second = tokenizer.decode(found.second)
    assert second.startswith(" ")
    assert texts[0].startswith(found.first + second)
    assert found.num_bytes == len(second.encode())
    assert 12 <= len(found.second) <= 24
    assert halve("too short", tokenizer, 48) is None
    assert halve("x" * 500, tokenizer, 48) is None


def test_losses_equal_a_plain_loop(job: ScoreJob) -> None:
    found = {(each.kind, each.share): each for each in measure_noise(job)}
    tokenizer, model = job.subject.tokenizer, job.subject.model
    assert tokenizer is not None
    halves = [halve(text, tokenizer, 48) for text in list(draw_texts(job))[:3]]
    words = [word for each in halves if each is not None for word in split_words(each.first)]
    for kind, share in (("random case", 0.0), ("random case", 0.3), ("replaced words", 0.3), (NO_CONTEXT, 1.0)):
        losses, sizes = [], []
        for index, each in enumerate(halves):
            assert each is not None
            first = "" if kind == NO_CONTEXT else make_noise(kind, each.first, share, (0, index), words)
            before = [1, *tokenizer.encode(first, add_special_tokens=False)]
            ids = torch.tensor([*before, *each.second.tolist()])
            with torch.no_grad():
                log_p = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            losses.append(-sum(float(log_p[at - 1, ids[at]]) for at in range(len(before), len(ids))))
            sizes.append(each.num_bytes)
        here = found[kind, share]
        assert here.num_documents == 3
        assert here.bits_per_byte == pytest.approx(sum(losses) / np.log(2) / sum(sizes), rel=1e-5)
    for kind in NOISES:
        assert found[kind, 0.0].difference == pytest.approx(0.0, abs=1e-9)
        assert found[kind, 0.3].difference != 0.0
        assert found[kind, 0.3].difference_error is not None


def test_without_a_start_token_the_first_half_cannot_be_left_out(
    make_model: Callable[..., Path], make_job: Callable[..., ScoreJob], texts: list[str]
) -> None:
    job = make_job(make_model("llama", start=False), texts, documents=2, opening=48, noise_shares=(0.1,))
    assert NO_CONTEXT not in {each.kind for each in measure_noise(job)}


def test_what_is_missing_is_named(
    make_model: Callable[..., Path], make_job: Callable[..., ScoreJob], texts: list[str]
) -> None:
    folder = make_model("llama")
    with pytest.raises(SectionNotRun, match="held-out text is required"):
        measure_noise(make_job(folder))
    with pytest.raises(SectionNotRun, match="a document of at least 200 tokens is required"):
        measure_noise(make_job(folder, ["A short text, and no more."], opening=200))
