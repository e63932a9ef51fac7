"""Inputs that an evaluation refuses."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from refold.data.readers import from_documents
from refold.errors import DataError, RefoldError, SourceError
from refold.evaluation.evaluate import evaluate
from refold.evaluation.settings import EvaluationSettings
from refold.modeling.load import load_model, load_tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 257}, r"context: must be at most 256, the positions of .* \(got 257\)"),
        ({"context": 0}, r"context: at least 1 token is required \(got 0\)"),
        ({"context": 8, "stride": 9}, r"a stride between 1 and the context of 8 tokens is required \(got 9\)"),
        ({"batch_size": 0}, r"batch_size: at least 1 window is required \(got 0\)"),
        ({"max_tokens": 1}, r"data: a document of at least two tokens is required \(got 1 in all\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(source, sentences, options, message: str):
    with pytest.raises(DataError, match=message):
        evaluate(source, from_documents(sentences), EvaluationSettings(device="cpu", **options))


def test_another_vocabulary_is_refused(source, make_source, make_model, sentences, tmp_path: Path):
    data = from_documents(sentences)
    with pytest.raises(SourceError, match=r"against: the vocabulary of .* is required \(got 300 and 96 tokens\)"):
        evaluate(source, data, EvaluationSettings(device="cpu"), against=make_source("llama"))
    other = make_model()
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace('"</s>"', '"<end>"'), encoding="utf-8")
    config = (other / "tokenizer_config.json").read_text(encoding="utf-8")
    (other / "tokenizer_config.json").write_text(config.replace('"</s>"', '"<end>"'), encoding="utf-8")
    with pytest.raises(SourceError, match=r"\(got 2 entries that only one has\); compare models that share a token"):
        evaluate(source, data, EvaluationSettings(device="cpu"), against=other)


def test_a_tokenizer_is_required(source, make_source, sentences):
    data = from_documents(sentences)
    with pytest.raises(SourceError, match=r"a tokenizer is required \(none there\); copy its files into the folder"):
        evaluate(make_source("llama"), data, EvaluationSettings(device="cpu"))
    with pytest.raises(SourceError, match="a tokenizer is required"):
        evaluate(load_model(source, device="cpu"), data)


@pytest.mark.parametrize("option", [{"dtype": "bfloat16"}, {"device": "cpu"}])
def test_a_loaded_model_is_not_moved(source, sentences, option):
    model = load_model(source, device="cpu")
    with pytest.raises(RefoldError, match=r"only a model loaded from a folder can be given one \(got .* for a loaded"):
        evaluate(model, from_documents(sentences), EvaluationSettings(**option), tokenizer=load_tokenizer(source))


def test_models_on_two_devices_are_refused(source, sentences):
    other: Any = load_model(source, device="cpu")
    other.to("meta")
    with pytest.raises(RefoldError, match=r"against: both models on one device are required \(got cpu and meta\)"):
        evaluate(source, from_documents(sentences), EvaluationSettings(device="cpu"), against=other)


def test_numbers_that_are_not_finite_are_refused(source, sentences):
    model: Any = load_model(source, device="cpu")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(RefoldError, match=r"finite predictions are required \(got nan in float32\); the weights are"):
        evaluate(model, from_documents(sentences), tokenizer=load_tokenizer(source))
