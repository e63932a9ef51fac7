"""Feature maps of whole conversions: fit, stored tensors, and distance from softmax by depth."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from refold.calibration.layers import SourceLayers
from refold.checkpoint.reader import CheckpointReader
from refold.conversion.convert import ConvertOptions, convert
from refold.conversion.inspect import inspect
from refold.conversion.map_fitter import FitSettings, MapFitter
from refold.data.packing import PackedSequence
from refold.data.readers import DataSource, from_documents
from refold.errors import DataError, RecipeError
from refold.modeling.load import load_model
from refold.planning.approximation import stored_maps
from refold.planning.plan import plan, read_plan
from refold.sources.pieces import PieceReader
from refold.sources.source_model import read_source_model

SMALL = FitSettings(sequence_length=64, fit_sequences=8, held_out_sequences=4, steps=100)
NAMES = ("q_map.weight", "k_map.weight")


@pytest.fixture(scope="module")
def source(make_model: Callable[..., Path]) -> Path:
    return make_model(max_position_embeddings=64)


@pytest.fixture(scope="module")
def text(sentences: tuple[str, ...]) -> DataSource:
    order = torch.randint(len(sentences), (400, 4), generator=torch.Generator().manual_seed(3)).tolist()
    return from_documents([" ".join(sentences[place] for place in row) for row in order])


def swap(**options: Any) -> dict[str, Any]:
    return {"mixers": [{"type": "linear_attention", **options}]}


def run(source: Path, recipe: dict[str, Any], text: DataSource | None = None) -> MapFitter:
    made, model = plan(source, recipe, allow_larger=True).settle(), read_source_model(source)
    with CheckpointReader(source) as reader:
        fitter = MapFitter(made, model, PieceReader(model, reader), settings=SMALL)
        fitter.run(text)
    return fitter


@pytest.mark.parametrize("feature_map", ["hedgehog", "t2r"])
def test_on_text_every_depth_gains_by_the_fit(source: Path, text: DataSource, feature_map: str) -> None:
    fitter = run(source, swap(feature_map=feature_map, fit="calibration"), text)
    assert list(fitter.approximation) == [f"depths.{depth}" for depth in range(4)]
    for found in fitter.approximation.values():
        assert found.fitted is not None
        assert found.fitted_gap is not None
        assert found.fitted < found.start
        assert found.fitted_gap < found.start_gap
        assert (found.inputs, found.tokens) == ("text", 4 * 64)
    assert set(fitter.tensors) == {f"model.mixers.{part}.{name}" for part in range(4) for name in NAMES}


def test_without_text_maps_are_fitted_and_measured_on_random_inputs(source: Path) -> None:
    fitter = run(source, swap(fit="data_free", **{"except": [0, 2]}))
    assert list(fitter.approximation) == ["depths.1", "depths.3"]
    for found in fitter.approximation.values():
        assert found.inputs == "random"
        assert found.fitted is not None
        assert found.fitted < found.start


def test_more_random_features_are_nearer_at_every_depth(source: Path, text: DataSource) -> None:
    errors = []
    for features in (4, 64, 1024):
        found = run(source, swap(feature_map="favor", features=features), text).approximation
        assert all(each.fitted is None for each in found.values())
        errors.append([each.start for each in found.values()])
    for fewer, more in itertools.pairwise(errors):
        assert all(b < a for a, b in zip(fewer, more, strict=True)), errors


def test_layers_that_share_a_map_are_fitted_together(source: Path, text: DataSource) -> None:
    fold = {"fold": {"loops": 2, "init": "average"}}
    fitter = run(source, {**swap(fit="calibration"), **fold}, text)
    assert set(fitter.tensors) == {f"model.mixers.{part}.{name}" for part in range(2) for name in NAMES}
    assert len(fitter.approximation) == 4
    alone = run(source, swap(fit="calibration"), text)
    for part in range(2):
        name = f"model.mixers.{part}.q_map.weight"
        assert not torch.allclose(fitter.tensors[name], alone.tensors[name], atol=1e-2)
        for depth in (part, part + 2):
            found = fitter.approximation[f"depths.{depth}"]
            assert found.fitted is not None
            assert found.fitted < found.start


def test_depths_with_vectors_of_their_own_have_maps_of_their_own(source: Path, text: DataSource) -> None:
    recipe = {**swap(fit="calibration"), "fold": {"loops": 2}, "relax": {"rank": 2, "vectors": "own"}}
    fitter = run(source, recipe, text)
    owned = {f"model.depths.{depth}.vectors.mixer.{name}" for depth in range(4) for name in NAMES}
    assert set(fitter.tensors) == owned
    assert all(found.fitted is not None for found in fitter.approximation.values())


def test_depths_whose_queries_start_fresh_are_left_out(source: Path) -> None:
    made = plan(source, swap(transfer=["k_proj", "v_proj", "o_proj", "mlp"]), allow_larger=True)
    assert stored_maps(made.blueprint, made.starts) == ()
    for recipe in ({"weights": "fresh"}, {"mixers": [{"type": "gla"}]}):
        made = plan(source, {**swap(fit="calibration"), **recipe}, allow_larger=True)
        assert stored_maps(made.blueprint, made.starts) == ()


@torch.no_grad()
def test_a_folder_holds_the_fitted_maps_and_says_how_far_they_are_off(
    source: Path, text: DataSource, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    made = convert(
        source,
        tmp_path / "out",
        swap(fit="calibration", **{"except": [2, 3]}),
        options=ConvertOptions(allow_larger=True, progress=lambda *at: told.append(at)),
        calibration=text,
    )
    assert read_plan(tmp_path / "out" / "plan.json") == made
    assert inspect(tmp_path / "out").approximation == dict(made.approximation)
    assert f"calibration text: {text.name}" in map(str, made.notes)
    num_tensors = len(load_file(tmp_path / "out" / "model.safetensors"))
    assert told == [(step, num_tensors + 2) for step in range(1, num_tensors + 3)]
    # The folder's own mixer, on the stream of the source before it.
    model, origin = load_model(tmp_path / "out").model, read_source_model(source)
    ids = torch.randint(3, 290, (2, 64), generator=torch.Generator().manual_seed(0))
    rows = PackedSequence(ids, torch.arange(64).expand(2, -1), ids)
    with CheckpointReader(source) as reader:
        layer, streams = next(SourceLayers(origin, PieceReader(origin, reader)).walk(rows))
        truth = layer.attention(streams, rows.position_ids).weights
    context = model.depths[0].inputs(model.batch(streams))
    fitted = model.mixers[0].matrix(streams, model.depths[0].view, context, {}, None)
    for name in NAMES:
        model.mixers[0].get_parameter(name).copy_(torch.eye(8).expand(4, 8, 8))
    unfitted = model.mixers[0].matrix(streams, model.depths[0].view, context, {}, None)
    errors = [float((truth - each).abs().sum(-1).mean() / 2) for each in (fitted, unfitted)]
    assert errors[0] < errors[1]
    found = made.approximation["depths.0"]
    assert errors[1] == pytest.approx(found.start, rel=0.25)
    assert errors[0] == pytest.approx(found.fitted, rel=0.25)


def test_two_conversions_give_the_same_bits(source: Path, tmp_path: Path) -> None:
    recipe = swap(fit="data_free", **{"except": [1, 2, 3]})
    for name in ("one", "other"):
        convert(source, tmp_path / name, recipe, options=ConvertOptions(allow_larger=True))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_unfitted_maps_are_stored_as_they_start(source: Path, text: DataSource, tmp_path: Path) -> None:
    made = convert(source, tmp_path / "out", swap(), options=ConvertOptions(allow_larger=True), calibration=text)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["model.mixers.0.q_map.weight"], torch.eye(8).expand(4, 8, 8))
    assert all(found.fitted is None and found.inputs == "text" for found in made.approximation.values())


def test_a_fit_to_text_without_text_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"text is required for `fit: calibration` at depth 0 .*--calibration FILE"):
        convert(source, tmp_path / "out", swap(fit="calibration"), options=ConvertOptions(allow_larger=True))
    assert not (tmp_path / "out").exists()


def test_a_fit_of_fresh_queries_is_refused_when_planned(source: Path) -> None:
    with pytest.raises(RecipeError, match=r"at depth 0 \(got fresh ones\); add q_proj and k_proj to transfer"):
        plan(source, swap(fit="data_free", transfer=["v_proj", "o_proj", "mlp"]), allow_larger=True)


def test_text_that_nothing_uses_is_refused(source: Path, text: DataSource, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"calibration: this recipe does not use calibration text; remove --calibration"
    ):
        convert(source, tmp_path / "out", {"fold": {"loops": 2}}, calibration=text)


def test_text_too_short_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give more of it"):
        convert(
            source,
            tmp_path / "deep" / "out",
            swap(fit="calibration"),
            options=ConvertOptions(allow_larger=True),
            calibration=from_documents(["A short one."]),
        )
    assert list(tmp_path.iterdir()) == []
