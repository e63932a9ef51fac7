from refold.blueprint.origins import Origin
from refold.blueprint.owned.coefficients import COEFFICIENTS
from refold.blueprint.owned.merge import Merge
from refold.blueprint.owned.registry import merge_at
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe

RECIPE = {"fold": {"loops": 2}, "relax": {"rank": 2}, "factor": {"parameters": 0.8, "share": "basis"}}


def test_coefficients_are_the_output_side_of_a_shared_basis(make_arch):
    blueprint, starts, _ = build_blueprint(make_arch(4), load_recipe(RECIPE))
    bases = blueprint.mixers[0].bases | blueprint.mlps[0].bases
    found = {each.linear: each for each in COEFFICIENTS.tensors(blueprint, 2)}
    assert found.keys() == bases.keys()
    assert found["k_proj"].name == "model.depths.2.coefficients.k_proj"
    assert found["k_proj"].shape == (16, bases["k_proj"])
    assert found["k_proj"].origin(blueprint, starts) == Origin("joint", "mixer.k_proj.weight", (0, 2))
    assert found["down_proj"].groups == {"mlps"}
    assert COEFFICIENTS.is_matrix(found["k_proj"])
    assert COEFFICIENTS.is_quantised(blueprint, found["k_proj"])
    assert COEFFICIENTS.flops(blueprint, 2) == 2 * sum(each.num_elements for each in found.values())


def test_the_product_with_the_basis_comes_before_that_of_the_lora(make_arch):
    blueprint = build_blueprint(make_arch(4), load_recipe(RECIPE)).blueprint
    basis = ("model.mixers.0.k_proj.a.weight", "model.depths.2.coefficients.k_proj")
    pair = ("model.depths.2.lora.k_proj.a", "model.depths.2.lora.k_proj.b")
    assert merge_at(blueprint, 2, "mixer", "k_proj.weight") == Merge(None, (basis, pair))
    assert COEFFICIENTS.describe(blueprint, 2).startswith("basis ")


def test_linears_that_are_stored_whole_have_no_coefficients(make_arch):
    blueprint = build_blueprint(make_arch(4), load_recipe({"fold": {"loops": 2}})).blueprint
    assert not list(COEFFICIENTS.tensors(blueprint, 2))
    assert COEFFICIENTS.describe(blueprint, 2) == ""
    assert COEFFICIENTS.flops(blueprint, 2) == 0
    assert merge_at(blueprint, 2, "mixer", "k_proj.weight") == Merge("model.mixers.0.k_proj.weight")
