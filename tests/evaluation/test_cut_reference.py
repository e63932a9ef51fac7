"""A model with a cut vocabulary against its source: figures of the source are those of its own tokens."""

from pathlib import Path

import pytest
import torch

from refold.cli.evaluation_tables import print_evaluation
from refold.conversion.convert import ConvertOptions, convert
from refold.data.readers import from_documents
from refold.errors import SourceError
from refold.evaluation.evaluate import evaluate
from refold.evaluation.reference import Reference
from refold.evaluation.settings import EvaluationSettings
from refold.modeling.load import load_model, load_tokenizer
from refold.vocabulary.kept_tokens import read_kept_tokens

TEXT = ["The sea was calm that night, and the moon lay on it. " * 3]
OTHER = ["It was the best of times, it was the worst of times. ", "def add(a, b):\n    return a + b\n" * 2]
SETTINGS = EvaluationSettings(context=24, stride=12, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def models(make_model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    source, out = make_model(), tmp_path_factory.mktemp("cut") / "model"
    recipe = {"vocabulary": {"multiple": 1}}
    convert(source, out, recipe, options=ConvertOptions(allow_larger=True), calibration=TEXT)
    return source, out


@pytest.mark.parametrize("limit", [None, 31])
@pytest.mark.parametrize("texts", [TEXT, OTHER, TEXT + OTHER])
def test_the_source_has_the_figures_of_its_own_tokens(texts, limit, models):
    source, cut = models
    settings = EvaluationSettings(context=24, stride=12, device="cpu", dtype="float32", max_tokens=limit)
    found = evaluate(cut, from_documents(texts), settings, against=source).against
    assert found is not None
    if limit is None:
        alone = evaluate(source, from_documents(texts), settings)
        assert found.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-12)
        assert found.accuracy == alone.accuracy
    assert found.kept_tokens == load_model(cut, device="cpu").config.vocab_size
    # Nothing but the vocabulary differs, so the renormalised predictions agree on every token.
    assert found.agreement == 1.0
    assert found.kl == pytest.approx(0, abs=1e-6)


def test_dropped_tokens_make_a_text_longer_and_worse(models):
    source, cut = models
    known = evaluate(cut, from_documents(TEXT), SETTINGS, against=source)
    other = evaluate(cut, from_documents(OTHER), SETTINGS, against=source)
    assert known.against is not None
    assert other.against is not None
    assert known.tokens == evaluate(source, from_documents(TEXT), SETTINGS).tokens
    assert other.tokens > evaluate(source, from_documents(OTHER), SETTINGS).tokens
    # No probability is spent on dropped tokens.
    assert known.against.difference < 0


def test_kl_is_that_of_renormalised_predictions(models, make_model, tmp_path):
    source, cut = models
    recipe = {"vocabulary": {"keep": str(cut / "kept_tokens.json"), "multiple": 1}, "fold": {"loops": 2}}
    convert(source, tmp_path / "fold", recipe)
    found = evaluate(
        tmp_path / "fold", from_documents(TEXT), EvaluationSettings(context=200, device="cpu"), against=source
    )
    kept, tokenizer = read_kept_tokens(tmp_path / "fold"), load_tokenizer(tmp_path / "fold")
    assert kept is not None
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT[0], add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        p = load_model(source, device="cpu")(kept.to_source(ids)).logits[0, :-1, torch.from_numpy(kept.ids)]
        q = load_model(tmp_path / "fold", device="cpu")(ids).logits[0, :-1].double().log_softmax(-1)
    p = p.double().log_softmax(-1)
    assert found.against is not None
    assert found.against.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.against.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.against.kl > 0.01


def test_one_reference_serves_whole_and_cut_models(models, tmp_path, capsys):
    source, cut = models
    convert(source, tmp_path / "strict", {"fold": {"loops": 2}})
    kept = Reference(source, device="cpu")
    found = [
        evaluate(each, from_documents(TEXT), SETTINGS, against=kept).against for each in (tmp_path / "strict", cut)
    ]
    again = [
        evaluate(each, from_documents(TEXT), SETTINGS, against=source).against for each in (tmp_path / "strict", cut)
    ]
    assert found == again
    assert [each is not None and each.kept_tokens is None for each in found] == [True, False]
    print_evaluation(evaluate(cut, from_documents(TEXT), SETTINGS, against=kept))
    assert "keeps; the other figures of" in " ".join(capsys.readouterr().out.split())


def test_kinds_of_text_are_compared_each_by_itself(models, tmp_path):
    source, cut = models
    for number, text in enumerate((TEXT[0], OTHER[0])):
        (tmp_path / f"{number}.txt").write_text(text)
    paths = [tmp_path / "0.txt", tmp_path / "1.txt"]
    found = evaluate(cut, paths, SETTINGS, against=source)
    for kind, path in zip(found.kinds, paths, strict=True):
        alone = evaluate(cut, [path], SETTINGS, against=source)
        assert alone.against is not None
        assert kind.difference == pytest.approx(alone.against.difference, rel=1e-9)


def test_a_source_with_other_tokens_is_refused(models, tmp_path, with_swapped_tokens):
    source, cut = models
    other = with_swapped_tokens(source, tmp_path / "other")
    with pytest.raises(SourceError, match=r"against: the vocabulary of .* is required"):
        evaluate(cut, from_documents(TEXT), SETTINGS, against=other)
