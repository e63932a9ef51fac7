import pytest

from refold.blueprint.origins import Origin
from refold.blueprint.owned.merge import Merge
from refold.blueprint.owned.registry import merge_at
from refold.blueprint.owned.vectors import VECTORS
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe


def build(arch, vectors="own", **sections):
    return build_blueprint(
        arch, load_recipe({"fold": {"loops": 2}, "relax": {"rank": 2, "vectors": vectors}, **sections})
    )


def test_a_depth_keeps_norms_and_biases_of_both_parts(make_arch):
    blueprint, starts, _ = build(make_arch(4, attention_bias=True))
    found = {each.name.removeprefix("model.depths.2.vectors."): each for each in VECTORS.tensors(blueprint, 2)}
    biases = {f"mixer.{name}_proj.bias" for name in "qkvo"}
    assert found.keys() == biases | {"mixer.input_norm.weight", "mlp.input_norm.weight"}
    assert found["mixer.k_proj.bias"].shape == (16,)
    assert found["mixer.k_proj.bias"].origin(blueprint, starts) == Origin("copied", "mixer.k_proj.bias", (2,))
    assert found["mlp.input_norm.weight"].groups == {"vectors", "mlps"}
    assert not any(VECTORS.decays(each) or VECTORS.is_matrix(each) for each in found.values())
    assert VECTORS.describe(blueprint, 2) == "own"


def test_tied_vectors_belong_to_the_part(make_arch):
    blueprint = build(make_arch(4), "tied").blueprint
    assert not list(VECTORS.tensors(blueprint, 2))
    assert VECTORS.describe(blueprint, 2) == "tied"
    assert merge_at(blueprint, 2, "mixer", "input_norm.weight") == Merge("model.mixers.0.input_norm.weight")


@pytest.mark.parametrize(
    ("local", "own"), [("input_norm.weight", True), ("q_proj.bias", True), ("q_proj.weight", False)]
)
def test_own_vectors_take_the_place_of_the_stored_ones(make_arch, local, own):
    blueprint = build(make_arch(4, attention_bias=True)).blueprint
    merge = merge_at(blueprint, 2, "mixer", local)
    assert merge is not None
    assert merge.stored == (f"model.depths.2.vectors.mixer.{local}" if own else f"model.mixers.0.{local}")


def test_vectors_of_a_mixer_hold_what_the_mixer_asks_for_even_with_several_dimensions(make_arch):
    blueprint = build(make_arch(4), mixers=[{"type": "gated_deltanet"}]).blueprint
    found = {each.local: each for each in VECTORS.tensors(blueprint, 2)}
    assert found["conv1d.weight"].fill(blueprint).kind == "last_tap"
    assert len(found["conv1d.weight"].shape) == 2
    assert not VECTORS.decays(found["conv1d.weight"])
