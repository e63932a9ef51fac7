from collections import Counter

import pytest

from refold.blueprint.owned.kind import OwnedKind
from refold.blueprint.owned.registry import OWNED, owned_kinds
from refold.blueprint.tensors import target_tensors
from refold.planning.build import build_blueprint
from refold.recipe.heal import GROUPS
from refold.recipe.load import load_recipe

EXITS = {"norm": "own", "head_rank": 2, "gate": True}
RECIPES = (
    {},
    {
        "fold": {"loops": 2},
        "relax": {"rank": 3, "vectors": "own", "gain": "own"},
        "exits": {"norm": "own", "head_rank": 2, "gate": True},
    },
    {"fold": {"loops": 2}, "relax": {"type": "prefix", "length": 3}, "drop": {"mlp": {"count": 1}}},
    {"fold": {"loops": 2}, "relax": {"rank": 2}, "factor": {"parameters": 0.8, "share": "basis"}},
)


def every_kind(base: type = OwnedKind) -> set[type]:
    return {kind for each in base.__subclasses__() for kind in (each, *every_kind(each))}


def test_every_descriptor_is_listed_once():
    assert Counter(type(kind) for kind in OWNED) == dict.fromkeys(every_kind(), 1)


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_every_tensor_of_a_depth_is_claimed_by_exactly_one_descriptor(make_arch, recipe):
    blueprint = build_blueprint(make_arch(4), load_recipe(recipe)).blueprint
    owned = {each.name: each.kind for each in target_tensors(blueprint) if each.depth is not None}
    claimed = [(each.name, kind) for kind in OWNED for index in range(4) for each in kind.tensors(blueprint, index)]
    assert len(claimed) == len(owned)
    assert dict(claimed) == owned
    assert all(name.startswith(("model.depths.", "model.exits.")) for name in owned)


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_the_kinds_of_a_blueprint_are_those_with_tensors_in_it(make_arch, recipe):
    blueprint = build_blueprint(make_arch(4), load_recipe(recipe)).blueprint
    assert owned_kinds(blueprint) == tuple(
        kind for kind in OWNED if any(True for index in range(4) for _ in kind.tensors(blueprint, index))
    )


def test_every_descriptor_is_chosen_by_some_recipe(make_arch):
    made = [build_blueprint(make_arch(4), load_recipe(recipe)).blueprint for recipe in RECIPES]
    assert {kind for blueprint in made for kind in owned_kinds(blueprint)} == set(OWNED)


def test_tensors_of_one_linear_stand_together_in_the_order_linears_run(make_arch):
    blueprint = build_blueprint(make_arch(4), load_recipe(RECIPES[3])).blueprint
    names = [each.name for each in target_tensors(blueprint) if each.depth == 0]
    ends = [f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")]
    expected = [(f"coefficients.{end}", f"lora.{end}.a", f"lora.{end}.b") for end in ends]
    assert names == [f"model.depths.0.{name}" for names in expected for name in names]


@pytest.mark.parametrize("kind", OWNED, ids=lambda kind: type(kind).__name__)
def test_every_descriptor_has_a_source_and_groups_that_a_stage_can_name(kind):
    assert kind.url.startswith("https://arxiv.org/abs/")
    assert kind.groups <= set(GROUPS)
