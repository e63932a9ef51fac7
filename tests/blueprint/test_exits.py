"""The objects of exits: from the recipe to the blueprint, its tensors and its cost."""

import pytest
from pydantic import ValidationError

from refold.blueprint.cost import cost, count_parameters
from refold.blueprint.origins import Origin
from refold.blueprint.owned.exits import EXIT, count_exit_parameters, exit_tensors
from refold.blueprint.schema import Blueprint, Exit
from refold.blueprint.tensors import target_tensors
from refold.errors import RecipeError
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe

FULL = {"norm": "own", "head_rank": 3, "gate": True}


def build(arch, exits: dict, **sections):
    return build_blueprint(arch, load_recipe({"fold": {"loops": 2}, "exits": exits, **sections}))


def test_each_exit_gets_what_the_recipe_says(make_arch):
    depths = build(make_arch(8), {"at": [1, 3], **FULL}).blueprint.depths
    assert [index for index, depth in enumerate(depths) if depth.exit is not None] == [1, 3]
    assert depths[1].exit == depths[3].exit == Exit(norm="own", head_rank=3, gate=True)
    plain = build(make_arch(4), {}).blueprint.depths[1].exit
    assert plain is not None
    assert not plain.has_parts


def test_the_heads_rank_is_capped_at_its_smaller_side(make_arch):
    capped = build(make_arch(4), {"head_rank": 1000}).blueprint.depths[1].exit
    assert capped is not None
    assert capped.head_rank == 32


@pytest.mark.parametrize(
    ("exits", "names"),
    [
        ({}, set()),
        ({"norm": "own"}, {"norm.weight"}),
        ({"head_rank": 3}, {"lora.lm_head.a", "lora.lm_head.b"}),
        ({"gate": True}, {"gate.weight", "gate.bias"}),
    ],
)
def test_what_is_stored_for_an_exit(make_arch, exits, names):
    blueprint = build(make_arch(4), exits).blueprint
    found = [tensor for tensor in target_tensors(blueprint) if tensor.kind is EXIT]
    assert {tensor.name for tensor in found} == {f"model.exits.1.{name}" for name in names}
    assert all(tensor.depth == 1 for tensor in found)
    spec = blueprint.depths[1].exit
    assert spec is not None
    assert spec.has_parts == bool(names)
    assert count_exit_parameters(blueprint.arch, spec) == sum(tensor.num_elements for tensor in found)
    assert count_parameters(blueprint).exits == sum(tensor.num_elements for tensor in found)


def test_layer_norms_of_exits_have_a_bias(make_arch):
    arch = make_arch(4, model_type="gpt_neox")
    assert exit_tensors(arch, Exit(norm="own")) == {"norm.weight": (32,), "norm.bias": (32,)}


def test_an_exit_starts_as_the_shared_norm_and_head(make_arch):
    blueprint, starts, _ = build(make_arch(4), FULL)
    found = {tensor.name: tensor.origin(blueprint, starts) for tensor in target_tensors(blueprint)}
    assert found["model.exits.1.norm.weight"] == Origin("copied", "norm.weight")
    assert found["model.exits.1.lora.lm_head.a"].how == found["model.exits.1.gate.weight"].how == "fresh"
    blueprint, starts, _ = build(make_arch(4), FULL, weights="fresh")
    norm = next(tensor for tensor in target_tensors(blueprint) if tensor.name == "model.exits.1.norm.weight")
    assert norm.origin(blueprint, starts) == Origin("fresh", "norm.weight")


def test_parts_of_exits_cost_bytes_always_and_flops_only_where_a_token_leaves(make_arch):
    arch = make_arch(8)
    shared, own = (cost(build(arch, {"at": [1, 3], **parts}).blueprint, 2) for parts in ({}, FULL))
    each = 32 + 3 * (32 + 96) + 33
    assert own.parameters - shared.parameters == own.non_embedding_parameters - shared.non_embedding_parameters
    assert own.weight_bytes - shared.weight_bytes == 2 * 2 * each
    assert own.flops_per_token == shared.flops_per_token
    assert [(left.depths, left.parameters) for left in own.exits] == [(2, each), (4, each)]
    head, lora, gate = 2 * 32 * 96, 2 * 3 * (32 + 96), 2 * 32
    depth = (shared.flops_per_token - head) // 8
    assert [left.flops_per_token for left in shared.exits] == [2 * depth + head, 4 * depth + head]
    assert [left.flops_per_token for left in own.exits] == [
        2 * depth + head + lora + gate,
        4 * depth + head + lora + 2 * gate,
    ]


def test_a_line_says_what_exits_add(make_arch):
    notes = list(map(str, build(make_arch(8), {"at": [1, 3], **FULL}).notes))
    assert f"exits after depth 1 and 3: own norm, head rank 3, gate, {2 * (32 + 3 * 128 + 33)} parameters" in notes[0]
    assert not any(note.startswith("exits") for note in map(str, build(make_arch(8), {"at": [1, 3]}).notes))


def test_the_last_depth_is_no_exit(make_arch):
    blueprint = build(make_arch(4), {}).blueprint.model_dump()
    blueprint["depths"][3]["exit"] = {"gate": True}
    with pytest.raises(ValidationError, match=r"depths\[3\]\.exit: an exit must stand before the last depth"):
        Blueprint.model_validate(blueprint)
    with pytest.raises(RecipeError, match=r"exits\.at: depth 3 is out of range"):
        build(make_arch(4), {"at": [3]})


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ({"norm": "mine"}, r"exits\.norm: must be"),
        ({"head_rank": -1}, r"exits\.head_rank: must be at least 0 \(got -1\)"),
        ({"gates": True}, r"exits\.gates: unknown key; did you mean 'gate'"),
    ],
)
def test_mistakes_are_named_with_their_key(exits, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe({"exits": exits})
