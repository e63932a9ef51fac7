"""Depths with prefixes, the cost of prefixes, and all errors about them."""

from typing import Any

import pytest
from pydantic import ValidationError

from refold.blueprint.cost import cost, count_parameters
from refold.blueprint.schema import Blueprint
from refold.errors import RecipeError
from refold.planning.build import build_blueprint, identity_blueprint
from refold.recipe.load import load_recipe

FOLD = {"loops": 2}


def build(arch: Any, length: int = 5, relax: Any = None, **sections: Any) -> Blueprint:
    prefix = {"type": "prefix", "length": length, **(relax or {})}
    return build_blueprint(arch, load_recipe({"relax": prefix, **sections})).blueprint


@pytest.mark.parametrize(
    ("relax", "sections", "expected"),
    [
        ({}, {"fold": FOLD}, [5] * 6),
        ({}, {"fold": {**FOLD, "prelude": 1, "coda": 1}}, [0, 5, 5, 5, 5, 0]),
        ({"at": "all"}, {"fold": {**FOLD, "prelude": 2}}, [5] * 6),
        ({"at": "all"}, {}, [5] * 6),
        ({}, {"fold": FOLD, "drop": {"attention": {"layers": [1, 2]}}}, [5, 0, 0, 5, 0, 0]),
        ({}, {"fold": FOLD, "share_kv": {"from": "first_loop", "heads": [0]}}, [5] * 6),
    ],
)
def test_depths_whose_attention_is_tied_have_one(make_arch, relax, sections, expected):
    assert [depth.prefix for depth in build(make_arch(6), relax=relax, **sections).depths] == expected


@pytest.mark.parametrize(("length", "millions"), [(256, 9.4), (512, 18.9), (1024, 37.7), (2048, 75.5)])
def test_parameters_are_those_of_the_paper(make_arch, length, millions):
    """RRT, appendix H: prefixes on Gemma, 18 layers of hidden size 2048."""
    arch = make_arch(18, hidden_size=2048)
    plain = count_parameters(build_blueprint(arch, load_recipe({"fold": FOLD})).blueprint).total
    assert round((count_parameters(build(arch, length, fold=FOLD)).total - plain) / 1e6, 1) == millions


def test_keys_are_held_once_and_scores_are_paid_for_each_token(make_arch):
    arch = make_arch(4)
    plain, found = (
        cost(each, 2)
        for each in (build_blueprint(arch, load_recipe({"fold": FOLD})).blueprint, build(arch, 5, fold=FOLD))
    )
    assert found.state_bytes - plain.state_bytes == 4 * 5 * 2 * 2 * 8 * 2
    assert found.cache == plain.cache
    assert found.flops_per_token - plain.flops_per_token == 4 * 5 * 4 * 4 * 8
    assert found.context_flops == plain.context_flops


def test_the_plan_says_that_it_starts_worse(make_arch):
    relax = {"type": "prefix", "length": 5}
    (note,) = map(str, build_blueprint(make_arch(4), load_recipe({"fold": FOLD, "relax": relax})).notes)
    assert note.startswith(
        "relax: 4 depths have prefixes of 5 vectors (640 parameters); before training they are noise"
    )


REFUSED = [
    ({"relax": {"type": "prefx", "length": 3}}, r"relax: type: must be one of lora, prefix .*did you mean 'prefix'"),
    ({"relax": {"type": "prefix"}}, r"relax\.length: required"),
    ({"relax": {"type": "prefix", "length": 0}}, r"relax\.length: must be at least 1"),
    (
        {"relax": {"type": "prefix", "length": 3, "rank": 4}},
        r"relax\.rank: unknown key; must be one of at, gain, length",
    ),
    ({"relax": {"type": "lora", "rank": 3, "length": 4}}, r"relax\.length: unknown key"),
    ({"relax": {"type": "prefix", "length": 3}}, r"relax: tied attention is required for prefixes"),
    (
        {"relax": {"type": "prefix", "length": 3}, "fold": {**FOLD, "tie": ["mlp"]}},
        r"relax: tied attention is required",
    ),
    (
        {"relax": {"type": "prefix", "length": 3}, "fold": FOLD, "mixers": [{"type": "gla"}]},
        r"relax\.type: softmax attention is required for prefixes \(depth 0 has gla",
    ),
    (
        {"relax": {"type": "prefix", "length": 3}, "fold": FOLD, "share_kv": {"from": "first_loop"}},
        r"relax\.type: keys and values of its own are required for a prefix \(depth 3 reads those of depth 0\)",
    ),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED, ids=lambda each: str(each)[:80])
def test_what_cannot_have_a_prefix_is_refused(make_arch, sections, message):
    with pytest.raises(RecipeError, match=message):
        build_blueprint(make_arch(6), load_recipe(sections))


def test_a_blueprint_with_a_prefix_and_no_keys_is_refused(make_arch):
    plain = identity_blueprint(make_arch(3)).model_dump()
    plain["depths"][2].update(kv=[{"depth": 1, "heads": [0, 1]}], prefix=4)
    with pytest.raises(ValidationError, match=r"depths\[2\]\.prefix: a mixer that makes keys and values is required"):
        Blueprint.model_validate(plain)


def test_a_recipe_without_a_type_is_relaxed_by_loras():
    assert load_recipe({"relax": {"rank": 3}}) == load_recipe({"relax": {"type": "lora", "rank": 3}})
