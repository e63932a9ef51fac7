"""Evaluation of models whose linears are rounded to integers."""

from typing import Any

import pytest

from refold.blueprint.integers import COMMON_SCHEMES, SCHEMES
from refold.blueprint.quantisation import quantised_bytes
from refold.data.readers import from_documents
from refold.errors import RefoldError
from refold.evaluation.evaluate import evaluate
from refold.evaluation.settings import EvaluationSettings
from refold.modeling.load import load_model, load_tokenizer
from refold.modeling.quantise import quantise_linears
from refold.planning.build import identity_blueprint
from refold.sources.source_model import read_source_model


@pytest.mark.parametrize("scheme", [*COMMON_SCHEMES, "int3g128", "int2"])
def test_quantised_linears_are_scored_and_their_bytes_counted(source, folded, sentences, scheme: str):
    data = from_documents(sentences)
    for folder in (source, folded):
        whole = evaluate(folder, data, EvaluationSettings(device="cpu"))
        found = evaluate(folder, data, EvaluationSettings(quantise=scheme, device="cpu"), against=folder)
        model: Any = load_model(folder, device="cpu")
        quantise_linears(model, SCHEMES[scheme])
        by_hand = evaluate(model, data, tokenizer=load_tokenizer(folder))
        assert found.bits_per_byte == by_hand.bits_per_byte != whole.bits_per_byte
        assert (found.model.quantised, whole.model.quantised) == (scheme, None)
        arch = read_source_model(source).arch
        blueprint = identity_blueprint(arch) if folder == source else model.config.read_blueprint()
        assert found.model.weight_bytes == quantised_bytes(blueprint, 4, SCHEMES[scheme]) < whole.model.weight_bytes
        assert found.model.parameters == whole.model.parameters
        # The model compared with is not quantised.
        assert found.against is not None
        assert found.against.model == whole.model
        assert found.against.bits_per_byte == whole.bits_per_byte
        assert 0 < found.against.kl < (0.1 if scheme == "int8" else 10)


def test_int8_is_nearer_than_int4(source, sentences):
    data = from_documents(sentences)
    found = [
        evaluate(source, data, EvaluationSettings(quantise=scheme, device="cpu"), against=source).against
        for scheme in COMMON_SCHEMES
    ]
    assert found[0].kl < 0.2 * found[1].kl  # pyright: ignore[reportOptionalMemberAccess]


def test_what_cannot_be_quantised_is_refused(source, sentences):
    data = from_documents(sentences)
    with pytest.raises(RefoldError, match=r"quantise: must be int8, or int2 to int6 .* \(got 'int7'\)"):
        evaluate(source, data, EvaluationSettings(quantise="int7", device="cpu"))
    model = load_model(source, device="cpu")
    with pytest.raises(
        RefoldError, match=r"quantise: a model's folder is required \(got a loaded model, whose weights"
    ):
        evaluate(model, data, EvaluationSettings(quantise="int8"), tokenizer=load_tokenizer(source))
