"""Sums of each document, by which two evaluations of one text are paired."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from refold.data.readers import from_documents
from refold.evaluation.document_sums import ratio_error
from refold.evaluation.evaluate import evaluate
from refold.evaluation.result import DocumentScores, Evaluation
from refold.evaluation.settings import EvaluationSettings

SETTINGS = EvaluationSettings(context=16, stride=8, device="cpu")


def documents(found: Evaluation) -> DocumentScores:
    assert found.by_document is not None
    return found.by_document


def test_sums_of_documents_add_up_to_the_figures(source, sentences):
    found = evaluate(source, from_documents(sentences), SETTINGS)
    rows = documents(found)
    assert rows.hashes == tuple(hashlib.blake2b(text.encode()).hexdigest()[:10] for text in sentences)
    assert rows.bytes == tuple(len(text.encode()) for text in sentences)
    assert (sum(rows.bytes), sum(rows.tokens)) == (found.bytes, found.tokens)
    assert sum(rows.right) / found.tokens == found.accuracy
    # Nats are rounded to four places.
    assert sum(rows.nats) / math.log(2) / found.bytes == pytest.approx(found.bits_per_byte, abs=1e-4)
    error = ratio_error(np.array(rows.nats) / math.log(2), np.array(rows.bytes))
    assert error == pytest.approx(found.bits_per_byte_error, rel=1e-4)


def test_each_document_has_its_own_sums(source, sentences):
    together = documents(evaluate(source, from_documents(sentences), SETTINGS))
    for place, text in enumerate(sentences):
        alone = documents(evaluate(source, from_documents([text]), SETTINGS))
        assert alone.nats[0] == pytest.approx(together.nats[place], abs=2e-3)
        assert (alone.hashes[0], alone.tokens[0]) == (together.hashes[place], together.tokens[place])


def test_kinds_say_which_documents_are_theirs(source, sentences):
    kinds = [from_documents(sentences[:2], name="a"), from_documents(sentences[2:], name="b")]
    found = evaluate(source, kinds, SETTINGS)
    assert [kind.rows for kind in found.kinds] == [(0, 2), (2, len(sentences))]
    for kind in found.kinds:
        assert kind.rows is not None
        assert sum(documents(found).bytes[slice(*kind.rows)]) == kind.bytes


def test_a_document_that_was_cut_has_another_hash(source, sentences):
    whole = documents(evaluate(source, from_documents(sentences), SETTINGS))
    cut = documents(evaluate(source, from_documents(sentences), EvaluationSettings(16, 8, max_tokens=60, device="cpu")))
    assert 1 < len(cut.hashes) < len(sentences)
    assert cut.hashes[:-1] == whole.hashes[: len(cut.hashes) - 1]
    assert cut.hashes[-1] != whole.hashes[len(cut.hashes) - 1]


def test_documents_without_a_scored_token_have_no_bytes(make_model):
    without = make_model(start=False)
    found = evaluate(without, from_documents(["a", "", "The sea was calm."]), SETTINGS)
    rows = documents(found)
    # An empty document has no token at all, and one of a single token none that is scored.
    assert len(rows.hashes) == 2
    assert (rows.bytes[0], rows.tokens[0], rows.nats[0]) == (0, 0, 0.0)
    assert found.documents == 1


def test_a_tokenizer_is_known_by_its_tokens(source, make_model, with_swapped_tokens, sentences, tmp_path: Path):
    swapped = with_swapped_tokens(source, tmp_path / "swapped")
    text = from_documents(sentences[:1])
    names = [evaluate(model, text, SETTINGS).model.tokenizer for model in (source, make_model(), swapped)]
    assert len(names[0]) == 10
    assert names[0] == names[1] != names[2]
