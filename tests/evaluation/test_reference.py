"""A reference that serves several evaluations gives the same results as a new one for each."""

from pathlib import Path

import pytest

import refold
from refold.conversion.convert import convert
from refold.data.readers import from_documents
from refold.errors import SourceError
from refold.evaluation import reference as module
from refold.evaluation.evaluate import evaluate
from refold.evaluation.reference import Reference
from refold.evaluation.settings import EvaluationSettings
from refold.modeling.load import load_model


@pytest.fixture(scope="module")
def models(make_model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A source and two folds of it."""
    source, folder = make_model(), tmp_path_factory.mktemp("folds")
    convert(source, folder / "strict", {"fold": {"loops": 2}})
    convert(source, folder / "pruned", {"drop": {"block": {"count": 1, "by": "even"}}})
    return source, folder / "strict", folder / "pruned"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Records the models that references load, in order."""
    seen: list[object] = []
    original = module.open_subject

    def watched(model, *args, **kwargs):
        seen.append(model)
        return original(model, *args, **kwargs)

    monkeypatch.setattr(module, "open_subject", watched)
    return seen


def test_comparisons_are_those_with_the_model_itself(models, sentences, loaded):
    source, *folds = models
    settings = EvaluationSettings(context=24, stride=12, batch_size=3, device="cpu")
    kept = Reference(source, device="cpu")
    found = [evaluate(fold, from_documents(sentences), settings, against=kept).against for fold in folds]
    assert loaded == [source]
    new = [evaluate(fold, from_documents(sentences), settings, against=source).against for fold in folds]
    assert found == new
    assert loaded == [source] * 3
    assert found[0] != found[1]


def test_other_windows_are_computed_anew(models, sentences, loaded):
    source, fold, _ = models
    kept = Reference(source, device="cpu")
    for context in (24, 16, 24):
        found = evaluate(
            fold, from_documents(sentences), EvaluationSettings(context=context, device="cpu"), against=kept
        )
        expected = evaluate(source, from_documents(sentences), EvaluationSettings(context=context, device="cpu"))
        assert found.against is not None
        assert found.against.bits_per_byte == expected.bits_per_byte
    assert loaded == [source] * 2  # For windows of 24, for those of 16, and not again.


@pytest.mark.parametrize("share", [0, 0.5])
def test_what_is_over_the_limit_is_computed_anew(models, sentences, loaded, share: float):
    source, fold, _ = models
    whole = Reference(source, device="cpu")
    expected = evaluate(
        fold, from_documents(sentences), EvaluationSettings(context=24, device="cpu"), against=whole
    ).against
    size = sum(states.numel() * states.element_size() for states in whole._states.values())
    kept = Reference(source, device="cpu", remember=int(share * size))
    for _ in range(2):
        assert (
            evaluate(
                fold, from_documents(sentences), EvaluationSettings(context=24, device="cpu"), against=kept
            ).against
            == expected
        )
    assert loaded == [source] * 3
    assert sum(states.numel() * states.element_size() for states in kept._states.values()) <= share * size


def test_a_loaded_model_is_taken_as_it_is(models, sentences):
    source, fold, _ = models
    model = load_model(source, device="cpu").train()
    found = evaluate(fold, from_documents(sentences), EvaluationSettings(device="cpu"), against=refold.Reference(model))
    expected = evaluate(fold, from_documents(sentences), EvaluationSettings(device="cpu"), against=source)
    assert model.training
    assert found.against is not None
    assert expected.against is not None
    assert found.against.kl == expected.against.kl


def test_another_vocabulary_is_refused(models, make_source, sentences):
    _, fold, _ = models
    with pytest.raises(SourceError, match="against: the vocabulary of"):
        evaluate(
            fold,
            from_documents(sentences),
            EvaluationSettings(device="cpu"),
            against=Reference(make_source("llama"), device="cpu"),
        )
