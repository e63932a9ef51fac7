"""Openings of documents: the first tokens, drawn by the seed, with their bytes; kinds of text take turns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refold.errors import DataError
from refold.scorecard.job import ScoreJob
from refold.scorecard.openings import OpeningAmounts, draw_texts, fitting_opening, read_openings


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path]) -> Path:
    return make_model("llama")


def test_openings_are_the_first_tokens_with_their_bytes(
    folder: Path, make_job: Callable[..., ScoreJob], texts: list[str]
) -> None:
    job = make_job(folder, texts)
    found, tokenizer = read_openings(job, OpeningAmounts(3, 20)), job.subject.tokenizer
    assert tokenizer is not None
    for index, text in enumerate(list(draw_texts(job))[:3]):
        ids = found.document(index).tolist()
        assert ids == [1, *tokenizer.encode(text, add_special_tokens=False)[:19]]
        cut: Any = tokenizer.decode(ids[1:])
        assert text.startswith(cut)
        assert found.byte_offsets[index + 1] - found.byte_offsets[index] == len(cut.encode())


def test_the_seed_draws_the_documents(folder: Path, make_job: Callable[..., ScoreJob], texts: list[str]) -> None:
    drawn = [list(draw_texts(make_job(folder, texts, seed=seed))) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0]) == sorted(texts)


def test_kinds_of_text_take_turns(
    folder: Path, make_job: Callable[..., ScoreJob], texts: list[str], tmp_path: Path
) -> None:
    files: list[Any] = []
    for number in range(2):
        files.append(tmp_path / f"{number}.jsonl")
        rows = (f'{{"text": "{number} {text}"}}\n' for text in texts[: 4 + number])
        files[-1].write_text("".join(rows))
    drawn = [text[0] for text in draw_texts(make_job(folder, files))]
    assert drawn == ["0", "1"] * 4 + ["1"]


def test_short_documents_are_passed_over(folder: Path, make_job: Callable[..., ScoreJob], texts: list[str]) -> None:
    job = make_job(folder, ["This one is short.", *texts])
    assert read_openings(job, OpeningAmounts(20, 60, 60)).num_documents == len(texts)
    assert read_openings(job, OpeningAmounts(20, 60)).num_documents == len(texts) + 1


def test_an_opening_fits_the_positions(folder: Path, make_job: Callable[..., ScoreJob]) -> None:
    assert [fitting_opening(make_job(folder), tokens) for tokens in (100, 257, 500)] == [100, 257, 257]


def test_a_tokenizer_longer_than_the_embedding_is_refused(
    make_source: Callable[..., Path], folder: Path, make_job: Callable[..., ScoreJob], texts: list[str]
) -> None:
    from refold.modeling.load import load_model, load_tokenizer

    job = make_job(load_model(make_source("llama")), texts, load_tokenizer(folder))
    with pytest.raises(DataError, match="tokens below the model's 96 are required"):
        read_openings(job, OpeningAmounts(3, 20))
