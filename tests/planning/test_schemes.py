"""Schemes of weights by a recipe, and ranks in multiples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refold.blueprint.cost import count_weight_bytes
from refold.blueprint.quantisation import describe_schemes, without_schemes
from refold.blueprint.schema import Blueprint
from refold.blueprint.tensors import float_tensors, target_tensors
from refold.errors import RecipeError
from refold.planning.plan import plan

BASES = {"fold": {"loops": 2}, "factor": {"parameters": 0.7, "share": "basis", "weight": "none"}}


def test_a_plan_counts_the_stored_integers(make_source: Callable[..., Path]) -> None:
    source = make_source("llama")
    found = plan(source, {"quantise": {"to": "int4", "keep": {"o_proj": "float", "mlp": "int8"}}})
    stored = found.blueprint.mixers[0].quantised
    assert stored == {"q_proj": "int4", "k_proj": "int4", "v_proj": "int4"}
    assert set(found.blueprint.mlps[0].quantised.values()) == {"int8"}
    assert found.cost.target.parameters == found.cost.source.parameters
    assert found.cost.target.weight_bytes == count_weight_bytes(found.blueprint, 4) < found.cost.source.weight_bytes
    assert describe_schemes(found.blueprint) in " ".join(note.text for note in found.notes)


def test_each_stored_weight_becomes_its_pieces(make_source: Callable[..., Path]) -> None:
    blueprint = plan(make_source("llama"), {**BASES, "quantise": {"to": "int4z"}}).blueprint
    names = [each.name for each in target_tensors(blueprint)]
    assert "model.mixers.0.q_proj.a.weight_packed" in names
    assert "model.depths.1.coefficients.q_proj_zero_point" in names
    assert "model.mixers.0.q_proj.a.weight" not in names
    assert len(names) == len(set(names))
    floats = [each.name for each in float_tensors(blueprint)]
    assert floats == [each.name for each in target_tensors(without_schemes(blueprint))]
    assert Blueprint.model_validate(blueprint.model_dump(mode="json")) == blueprint


def test_a_recipe_that_heals_is_rounded_later(make_source: Callable[..., Path]) -> None:
    heal = [{"objective": "next_token", "tokens": 1000}]
    found = plan(make_source("llama"), {"fold": {"loops": 2}, "quantise": {"to": "int8"}, "heal": heal})
    assert not found.blueprint.mixers[0].quantised
    assert any(note.text == "quantise: after healing; convert writes floats" for note in found.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixers": {"quantised": {"qproj": "int8"}}}, r"mixers\[0\].quantised: names of stored linears are required"),
        ({"mixers": {"quantised": {"q_proj": "int7"}}}, r"must be int8, or int2 to int6 with z .* \(got 'int7'\)"),
        ({"depths": {"quantised": {"q_proj": "int8"}}}, r"depths\[0\].quantised: names of stored linears are required"),
    ],
)
def test_a_blueprint_has_schemes_only_of_stored_weights(
    make_source: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    data = plan(make_source("llama"), {}, allow_larger=True).blueprint.model_dump(mode="json")
    ((pool, fields),) = change.items()
    data[pool][0] |= fields
    with pytest.raises(ValueError, match=message):
        Blueprint.model_validate(data)


@pytest.mark.parametrize("section", [{"to": "int4", "keep": {"q_prj": "int8"}}, {"to": "int7"}, {"bits": 4}])
def test_a_wrong_section_is_refused(make_source: Callable[..., Path], section: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="quantise"):
        plan(make_source("llama"), {"quantise": section})


def test_ranks_are_rounded_down_to_multiples(make_source: Callable[..., Path]) -> None:
    source = make_source("llama", hidden_size=64, intermediate_size=96)
    recipe = {"factor": {"parameters": 0.7, "weight": "none"}}
    free = plan(source, recipe).blueprint.mlps[0].factors
    found = plan(source, {"factor": {**recipe["factor"], "multiple": 8}}).blueprint.mlps[0].factors
    assert any(rank % 8 for rank in free.values())
    assert found == {name: rank // 8 * 8 for name, rank in free.items()}
    relaxed = {"fold": {"loops": 2}, "relax": {"rank": {"q_proj": 13, "o_proj": 5, "up_proj": "full"}, "multiple": 8}}
    ranks = plan(source, relaxed, allow_larger=True).blueprint.depths[0].ranks
    assert ranks == {"q_proj": 8, "o_proj": 5, "up_proj": 64}


def test_formats_by_layer_win_over_the_others(make_source: Callable[..., Path]) -> None:
    section = {
        "to": "int4",
        "keep": {"mlp": "int8", "q_proj": "float"},
        "layers": {"q_proj": ["int3g64", "float", "int2", "int6"], "up_proj": ["int5g128"] * 4},
    }
    blueprint = plan(make_source("llama"), {"drop": {"attention": {"layers": [1]}}, "quantise": section}).blueprint
    assert [each.quantised.get("q_proj") for each in blueprint.mixers] == ["int3g64", "int2", "int6"]
    assert {each.quantised["k_proj"] for each in blueprint.mixers} == {"int4"}
    assert [each.quantised for each in blueprint.mlps] == [
        {"gate_proj": "int8", "up_proj": "int5g128", "down_proj": "int8"}
    ] * 4
    assert blueprint.quantised["embedding"] == "int8"


def test_a_tied_part_takes_the_format_of_its_first_layer_and_factors_that_of_their_linear(
    make_source: Callable[..., Path],
) -> None:
    recipe = {
        "fold": {"loops": 2},
        "factor": {"ranks": {"q_proj": [8, "full", 4, 4], "down_proj": [7, 40, 1, 1]}},
        "quantise": {"to": "int8", "layers": {"q_proj": ["int4", "int3", "int2", "int2"]}},
    }
    blueprint = plan(make_source("llama"), recipe).blueprint
    assert [each.quantised["q_proj"] for each in blueprint.mixers] == ["int4", "int3"]
    assert [each.factors for each in blueprint.mixers] == [{"q_proj": 8}, {}]
    assert [each.factors for each in blueprint.mlps] == [{"down_proj": 7}, {"down_proj": 32}]
    schemes = {each.name: each.scheme_name(blueprint) for each in float_tensors(blueprint)}
    assert schemes["model.mixers.0.q_proj.a.weight"] == schemes["model.mixers.0.q_proj.b.weight"] == "int4"
    assert schemes["model.mixers.1.q_proj.weight"] == "int3"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"q_prj": ["int4"] * 4}, r"quantise.layers.q_prj: must name a linear: q_proj, .*; did you mean 'q_proj'\?"),
        ({"q_proj": ["int4"] * 3}, r"quantise.layers.q_proj: one entry for each of the source's 4 layers .*got 3"),
        ({"q_proj": ["int4", "int1", "int4", "int4"]}, r"must be float, int8, or int2 .*got 'int1'\); did you mean"),
        ({"q_proj": []}, r"quantise.layers.q_proj"),
    ],
)
def test_wrong_lists_of_formats_are_named(
    make_source: Callable[..., Path], layers: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(make_source("llama"), {"quantise": {"to": "int4", "layers": layers}})
