"""Texts of several kinds, and results that are read back."""

import json
from pathlib import Path

import pytest

from refold.conversion.convert import ConvertOptions, convert
from refold.data.mixture import MixedSource, Mixture
from refold.data.readers import from_documents
from refold.data.split import split
from refold.errors import DataError
from refold.evaluation.evaluate import evaluate
from refold.evaluation.result import read_evaluation
from refold.evaluation.settings import EvaluationSettings
from refold.evaluation.text import describe_domain


def test_several_kinds_are_each_reported_and_the_whole_is_over_all(source: Path, folded: Path, sentences):
    first, second = list(sentences[:4]), ["Numbers 1 2 3 4 5 and 6.", "More of them: 7 8 9."]
    settings = EvaluationSettings(context=16, stride=8, device="cpu")
    kinds = [from_documents(first, name="prose"), from_documents(second, name="numbers")]
    whole = evaluate(folded, kinds, settings, against=source)
    assert [kind.name for kind in whole.kinds] == ["prose", "numbers"]
    for kind, texts in zip(whole.kinds, (first, second), strict=True):
        alone = evaluate(folded, texts, settings, against=source)
        assert alone.kinds == ()
        assert alone.against is not None
        assert (kind.documents, kind.tokens, kind.bytes) == (alone.documents, alone.tokens, alone.bytes)
        assert kind.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-5)
        assert kind.bits_per_byte_error == pytest.approx(alone.bits_per_byte_error, rel=1e-4)
        assert kind.difference == pytest.approx(alone.against.difference, abs=1e-6)
        assert kind.kl == pytest.approx(alone.against.kl, rel=1e-4)
        assert (kind.accuracy, kind.agreement) == pytest.approx((alone.accuracy, alone.against.agreement))
    together = evaluate(folded, [*first, *second], settings, against=source)
    assert whole.bits_per_byte == pytest.approx(together.bits_per_byte, rel=1e-5)
    assert (whole.documents, whole.bytes) == (together.documents, together.bytes)
    assert sum(kind.tokens for kind in whole.kinds) == whole.tokens


def test_a_bound_on_tokens_is_shared_out_among_kinds(source: Path, sentences):
    texts = [from_documents([sentence * 5], name=name) for sentence, name in zip(sentences, "abc", strict=False)]
    short = from_documents(["Short."], name="short")
    found = evaluate(source, [short, *texts], EvaluationSettings(max_tokens=200, context=16, device="cpu"))
    # Start tokens count: a short kind leaves its rest to the others.
    assert found.kinds[0].tokens < 20
    assert [kind.tokens for kind in found.kinds[1:]] == pytest.approx([(200 - found.kinds[0].tokens) / 3] * 3, abs=3)
    assert not found.is_whole_data


def test_weights_are_refused_where_nothing_is_mixed(source: Path, sentences):
    mixture = Mixture([(list(sentences), 1), (["Another kind of text here."], 2)])
    with pytest.raises(DataError, match=r"files without weights are required for an evaluation.*drop `=WEIGHT`"):
        evaluate(source, mixture, EvaluationSettings(device="cpu"))


def test_a_model_evaluated_on_its_calibration_text_alone_has_a_line(source: Path, sentences, tmp_path: Path):
    for name in ("books", "docs", "other"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join([*sentences, name] * 6))
    texts = {name: f"{tmp_path / name}.txt?name={name}" for name in ("books", "docs", "other")}
    recipe = {"factor": {"parameters": 0.7}, "calibration": {"tokens": 128, "context": 16}}
    data = [f"{texts['books']}=3", f"{texts['docs']}=1"]
    convert(source, tmp_path / "low", recipe, options=ConvertOptions(allow_larger=True), calibration=data)
    settings = EvaluationSettings(max_tokens=60, context=16, device="cpu")

    def notes(model: Path, *names: str) -> tuple[str, ...]:
        found = evaluate(model, [texts[name] for name in names], settings)
        assert [kind.name for kind in found.kinds] == ([*names] if len(names) > 1 else [])
        assert found.model.fitted_to == (() if model == source else ("books", "docs"))
        return found.notes

    for names in (("books", "docs"), ("books",), ("other",)):
        (line,) = notes(tmp_path / "low", *names)
        told = f"the model was fitted to books and docs and is evaluated on {' and '.join(names)} alone"
        assert line.startswith(told)
        assert "give text of another kind as a second --data" in line
        assert "\n" not in line
    assert notes(tmp_path / "low", "books", "other") == ()
    assert notes(source, "books") == ()
    stage = json.loads((tmp_path / "low" / "provenance.json").read_text())["stages"][0]
    assert stage["text"] == {"books": 0.75, "docs": 0.25}


def test_the_sides_of_a_split_are_of_one_kind(sentences):
    texts = [f"{number} {sentence}" for number in range(8) for sentence in sentences]
    train, held_out = split(from_documents(texts, name="books"), every=3)
    assert train.name != held_out.name
    assert len(describe_domain([train.name], held_out)) == 1
    both = MixedSource.of_whole(held_out, [held_out, from_documents(["Other text."], name="other")])
    assert describe_domain([train.name], both) == ()


def test_results_of_older_versions_are_read(source: Path, sentences, tmp_path: Path):
    found = evaluate(source, from_documents(sentences[:2]), EvaluationSettings(device="cpu", context=16))
    older = json.loads(found.model_dump_json())
    del older["notes"], older["model"]["fitted_to"]
    (tmp_path / "older.json").write_text(json.dumps(older))
    assert read_evaluation(tmp_path / "older.json") == found


def test_an_evaluation_of_kinds_is_read_back(source: Path, sentences, tmp_path: Path):
    found = evaluate(
        source,
        [from_documents(sentences), from_documents(["Other text there."], name="b")],
        EvaluationSettings(device="cpu"),
    )
    assert read_evaluation(found.write(tmp_path)) == found
