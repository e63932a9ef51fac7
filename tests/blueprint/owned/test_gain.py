import pytest

from refold.blueprint.cost import cost
from refold.blueprint.origins import Origin
from refold.blueprint.owned.gain import GAIN
from refold.blueprint.owned.merge import Merge
from refold.blueprint.owned.registry import merge_at
from refold.errors import RecipeError
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe

FOLD = {"loops": 2}


def build(arch, relax=None, **sections):
    recipe = {"fold": FOLD, "relax": {"rank": 0, "gain": "own", **(relax or {})}, **sections}
    return build_blueprint(arch, load_recipe(recipe))


def test_each_part_of_a_depth_has_one_number_that_is_one_at_first(make_arch):
    blueprint, starts, notes = build(make_arch(4))
    found = list(GAIN.tensors(blueprint, 2))
    assert [(each.name, each.shape) for each in found] == [
        ("model.depths.2.gain.mixer.weight", (1,)),
        ("model.depths.2.gain.mlp.weight", (1,)),
    ]
    assert found[0].origin(blueprint, starts) == Origin("fresh", "mixer.gain.weight")
    assert (found[0].fill(blueprint).kind, found[0].fill(blueprint).low) == ("constant", 1.0)
    assert [each.groups for each in found] == [{"gains", "adapters", "mixers"}, {"gains", "adapters", "mlps"}]
    assert not any(GAIN.decays(each) or GAIN.is_quantised(blueprint, each) for each in found)
    assert GAIN.describe(blueprint, 2) == "gain"
    assert notes[0].text.startswith("relax.gain: 4 depths scale the output of their parts (8 parameters, 1")


@pytest.mark.parametrize(
    ("relax", "sections", "expected"),
    [
        ({}, {}, [2] * 6),
        ({"gain": "tied"}, {}, [0] * 6),
        ({}, {"fold": {**FOLD, "prelude": 1, "coda": 1}}, [0, 2, 2, 2, 2, 0]),
        ({"at": "all"}, {"fold": {**FOLD, "prelude": 1, "coda": 1}}, [2] * 6),
        ({"at": "all"}, {"fold": None}, [2] * 6),
        ({}, {"drop": {"attention": {"layers": [1]}}}, [2, 1, 2, 2, 2, 2]),
        ({"rank": 3}, {}, [2] * 6),
        ({"type": "prefix", "length": 3, "rank": None}, {}, [2] * 6),
    ],
)
def test_relaxed_depths_have_gains(make_arch, relax, sections, expected):
    recipe = {"fold": FOLD, **sections, "relax": {"rank": 0, "gain": "own", **relax}}
    recipe = {name: each for name, each in recipe.items() if each is not None}
    recipe["relax"] = {name: each for name, each in recipe["relax"].items() if each is not None}
    blueprint = build_blueprint(make_arch(6), load_recipe(recipe)).blueprint
    assert [len(list(GAIN.tensors(blueprint, index))) for index in range(6)] == expected


def test_gains_cost_their_bytes_and_no_flops(make_arch):
    arch = make_arch(4)
    plain = cost(build(arch, {"gain": "tied"}).blueprint, 2)
    found = cost(build(arch).blueprint, 2)
    assert found.weight_bytes - plain.weight_bytes == 4 * 2 * 2
    assert found.parameters - plain.parameters == found.non_embedding_parameters - plain.non_embedding_parameters == 8
    assert found.flops_per_token == plain.flops_per_token
    assert found.cache_bytes(100) == plain.cache_bytes(100)


@pytest.mark.parametrize(
    ("model_type", "pool", "scaled", "offset"),
    [
        ("llama", "mixer", {"o_proj.weight", "o_proj.bias"}, 0.0),
        ("llama", "mlp", {"down_proj.weight", "down_proj.bias"}, 0.0),
        ("olmo2", "mixer", {"output_norm.weight", "output_norm.bias"}, 0.0),
        ("gemma2", "mlp", {"output_norm.weight", "output_norm.bias"}, 1.0),
        ("gemma", "mlp", {"down_proj.weight", "down_proj.bias"}, 0.0),
    ],
)
def test_the_last_tensors_of_a_part_are_scaled(make_arch, model_type, pool, scaled, offset):
    blueprint = build(make_arch(4, model_type=model_type)).blueprint
    gain = f"model.depths.3.gain.{pool}.weight"
    linears = {"mixer": ("q_proj", "o_proj"), "mlp": ("up_proj", "down_proj")}[pool]
    owners = (*linears, "input_norm", "output_norm")
    for local in (f"{owner}.{kind}" for owner in owners for kind in ("weight", "bias")):
        merge = merge_at(blueprint, 3, pool, local)
        assert merge is not None
        expected = Merge(f"model.{pool}s.1.{local}")
        if local in scaled:
            # Only the weight of a norm has an offset.
            added = offset if local == "output_norm.weight" else 0.0
            expected = Merge(f"model.{pool}s.1.{local}", scale=gain, offset=added)
        assert merge == expected, local


def test_other_values_are_refused():
    with pytest.raises(RecipeError, match=r"relax\.gain: must be one of tied, own \(got 'mine'\)"):
        load_recipe({"fold": FOLD, "relax": {"rank": 0, "gain": "mine"}})
