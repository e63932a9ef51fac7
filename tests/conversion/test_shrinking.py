"""Conversions whose fits shrink towards fits without text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from refold.checkpoint.locate import locate
from refold.conversion.convert import ConvertOptions, carry_out, convert
from refold.conversion.measured import keep_moments
from refold.conversion.quantise import QuantiseOptions, quantise
from refold.data.mixture import Mixture
from refold.data.readers import from_documents, open_data
from refold.errors import DataError, RecipeError, SourceError
from refold.planning.plan import plan_model
from refold.recipe.load import load_recipe
from refold.sources.source_model import read_source_model

SMALL = {"tokens": 512, "context": 32}
EVEN = {"factor": {"parameters": 0.6, "weight": "activations"}}
MEASURED = {"factor": {"parameters": 0.6, "weight": "fisher", "split": "measured"}}
TIED = {
    "fold": {"loops": 2, "init": "average", "align": "permutation"},
    "relax": {"rank": 4, "init": "joint", "weight": "activations"},
}


@pytest.fixture(scope="module")
def source(make_model: Callable[..., Path]) -> Path:
    return make_model("llama", hidden_size=48, intermediate_size=96)


@pytest.fixture
def made(source: Path, text: Path, tmp_path: Path) -> Callable[..., dict[str, Tensor]]:
    """Converts, and returns the weights."""

    def make(recipe: dict[str, Any], data: Any = text, **calibration: Any) -> dict[str, Tensor]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        given = {**recipe, "calibration": {**SMALL, **calibration}}
        convert(source, out, given, options=ConvertOptions(allow_larger=True), calibration=data)
        return load_file(out / "model.safetensors")

    return make


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def product(weights: dict[str, Tensor], linear: str) -> Tensor:
    return weights[f"model.{linear}.b.weight"] @ weights[f"model.{linear}.a.weight"]


def test_a_strength_of_one_is_the_fit_without_text(made):
    linears = ("mixers.1.q_proj", "mlps.2.down_proj")
    whole, none = made(EVEN, shrink=1), made({"factor": {"parameters": 0.6, "weight": "none"}}, None)
    half, zero = made(EVEN, shrink=0.5), made(EVEN, shrink=0)
    for linear in linears:
        plain = product(none, linear)
        assert torch.allclose(product(whole, linear), plain, atol=1e-4)
        far, near = (float((product(each, linear) - plain).norm()) for each in (zero, half))
        assert 1e-2 < near < far
    assert same(zero, made(EVEN))


def test_strengths_are_chosen_by_halves_or_kinds_and_twice_alike(made, sentences):
    one = made(MEASURED, shrink="auto")
    assert same(one, made(MEASURED, shrink="auto"))
    assert not same(one, made(MEASURED))
    kinds = Mixture([(list(sentences) * 20, 1), (["1 2 3 4 5 6 7 8 " * 400], 1)])
    mixed = made(MEASURED, kinds, shrink="auto")
    assert not same(mixed, one)
    assert all(value.isfinite().all() for value in mixed.values())


def test_aligned_and_tied_layers_shrink_too(made):
    plain, shrunk = (made(TIED, shrink=strength) for strength in ("none", "auto"))
    assert not same(plain, shrunk)
    assert all(value.isfinite().all() for value in shrunk.values())


def test_fits_in_sequence_shrink_too(made):
    plain, shrunk = (made(EVEN, order="sequential", shrink=strength) for strength in ("none", 0.5))
    assert not torch.equal(product(plain, "mixers.0.q_proj"), product(shrunk, "mixers.0.q_proj"))


def test_moments_kept_by_folds_serve_the_choice(source, text, tmp_path, made):
    recipe = {**MEASURED, "calibration": {**SMALL, "shrink": "auto"}}
    keep_moments(source, recipe, open_data(text), tmp_path / "folds")
    keep_moments(source, MEASURED | {"calibration": SMALL}, open_data(text), tmp_path / "plain")
    sizes = {
        name: sum(path.stat().st_size for path in (tmp_path / name).glob("layer-*")) for name in ("folds", "plain")
    }
    # Two halves take twice the disk.
    assert sizes["folds"] == pytest.approx(2 * sizes["plain"], rel=0.05)
    draft = plan_model(read_source_model(source), load_recipe(recipe), allow_larger=True)
    carry_out(draft, locate(source), tmp_path / "kept", moments=tmp_path / "folds")
    assert same(load_file(tmp_path / "kept" / "model.safetensors"), made(MEASURED, shrink="auto"))


# Slow; the strengths themselves are tested above.
@pytest.mark.long
def test_rounding_with_feedback_shrinks(source, sentences, tmp_path):
    data = list(sentences) * 20

    def rounded(name: str, scheme: str, shrink: float | str) -> dict[str, torch.Tensor]:
        options = QuantiseOptions(context=32, shrink=shrink)
        quantise(source, tmp_path / name, scheme, data=data, tokens=256, options=options)
        return load_file(tmp_path / name / "model.safetensors")

    # The embedding is rounded before the stack runs, so inputs are the same; rounding without text is feedback at 1,
    # but for the scales that feedback fits below 8 bits.
    quantise(source, tmp_path / "plain", "int8")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert same(rounded("one", "int8", 1), plain)
    assert not same(rounded("none", "int8", "none"), plain)
    found = {name: rounded(f"{name}-4", "int4", shrink) for name, shrink in {"one": 1, "auto": "auto"}.items()}
    assert not same(found["auto"], found["one"])
    convert(source, tmp_path / "floats", {}, options=ConvertOptions(allow_larger=True))
    options = QuantiseOptions(context=32, shrink="auto")
    made = quantise(tmp_path / "floats", tmp_path / "again", "int4", data=data, tokens=256, options=options)
    assert same(load_file(tmp_path / "again" / "model.safetensors"), found["auto"])
    assert ["0.65 on documentation" in line for line in made.notes] == [True]
    stages = json.loads((tmp_path / "again" / "provenance.json").read_text())["stages"]
    assert [each["text"] for each in stages] == [{}, {"documents in memory": None}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (1.5, r"calibration\.shrink: must be at most 1 \(got 1\.5\)"),
        (-0.1, r"calibration\.shrink: must be at least 0 \(got -0\.1\)"),
        ("automatic", r"calibration\.shrink: must be .*none.*auto.* \(got .?automatic"),
        (True, r"calibration\.shrink: must be a number \(got true\)"),
    ],
)
def test_another_strength_is_refused(made, given, message):
    with pytest.raises(RecipeError, match=message):
        made(EVEN, shrink=given)


def test_what_cannot_be_cross_checked_is_refused(source, text, tmp_path, made):
    with pytest.raises(DataError, match=r"calibration\.shrink: at least two sequences of 32 tokens .* \(got 1\)"):
        made(EVEN, tokens=32, shrink="auto")
    keep_moments(source, EVEN, from_documents([text.read_text()]), tmp_path / "moments")
    wanted = load_recipe({**EVEN, "calibration": {"shrink": "auto"}})
    draft = plan_model(read_source_model(source), wanted, allow_larger=True)
    with pytest.raises(SourceError, match=r"moments of two folds of the text are required .* \(got one\)"):
        carry_out(draft, locate(source), tmp_path / "out", moments=tmp_path / "moments")
    assert not (tmp_path / "out").exists()
