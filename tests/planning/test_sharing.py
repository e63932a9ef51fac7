"""Depths that read keys and values of others, tensors that are then dropped, and all errors in `share_kv`."""

from typing import Any

import pytest
from pydantic import ValidationError

from refold.blueprint.cost import cost
from refold.blueprint.schema import Blueprint, depth_linears, depth_vectors, part_linears, part_vectors
from refold.blueprint.tensors import target_tensors
from refold.errors import RecipeError
from refold.planning.build import build_blueprint, identity_blueprint
from refold.recipe.load import load_recipe

FOLD = {"loops": 2}
FIRST = {"from": "first_loop"}


def build(arch: Any, share: Any, **sections: Any) -> Blueprint:
    return build_blueprint(arch, load_recipe({"share_kv": share, **sections})).blueprint


def readers(blueprint: Blueprint) -> dict[int, int]:
    """Depth to the one depth it reads from."""
    return {index: depth.kv[0].depth for index, depth in enumerate(blueprint.depths) if depth.kv}


@pytest.mark.parametrize(
    ("share", "fold", "expected"),
    [
        (FIRST, {}, {3: 0, 4: 1, 5: 2}),
        (FIRST, {"loops": 3}, {2: 0, 3: 1, 4: 0, 5: 1}),
        (FIRST, {"prelude": 1, "coda": 1}, {3: 1, 4: 2}),
        (FIRST, {"pattern": "sequence"}, {1: 0, 3: 2, 5: 4}),
        (FIRST, {"pattern": "cycle_reversed"}, {3: 2, 4: 1, 5: 0}),
        (FIRST, {"tie": ["mlp"]}, {3: 0, 4: 1, 5: 2}),
        ({"from": "pairs"}, {}, {1: 0, 3: 2, 5: 4}),
        ({"from": {"back": 4}}, {}, {4: 0, 5: 1}),
        ([{"depth": 4, "from": 1}, {"depth": 2, "from": 0}], {}, {2: 0, 4: 1}),
    ],
)
def test_a_rule_or_a_list_says_who_reads_from_whom(make_arch, share, fold, expected):
    assert readers(build(make_arch(6), share, fold={**FOLD, **fold})) == expected


def test_rules_pass_over_depths_without_softmax_attention(make_arch):
    swaps = [{"type": "retention", "depths": [2]}]
    assert readers(build(make_arch(6), {"from": "pairs"}, mixers=swaps)) == {1: 0, 4: 3}
    dropped = {"attention": {"layers": [0]}}
    assert readers(build(make_arch(6), FIRST, fold={"loops": 3}, drop=dropped)) == {4: 2, 3: 1, 5: 1}


def test_heads_are_those_named_and_a_depth_makes_what_anybody_reads(make_arch):
    found = build(make_arch(4), {"from": {"back": 1}, "heads": [1]})
    assert [found.made_heads(depth) for depth in range(4)] == [(0, 1), (0, 1), (0, 1), (0,)]
    mixed = build(make_arch(4), [{"depth": 3, "from": 1, "heads": [0]}, {"depth": 3, "from": 0, "heads": [1]}])
    assert [(read.depth, read.heads) for read in mixed.depths[3].kv] == [(1, (0,)), (0, (1,))]
    assert mixed.made_heads(3) == ()
    # What depth 2 makes is made for depth 3 alone; it looks at depth 0's.
    chain = build(make_arch(4), [{"depth": 2, "from": 0}, {"depth": 3, "from": 2}])
    assert [chain.made_heads(depth) for depth in range(4)] == [(0, 1), (0, 1), (0, 1), ()]


def test_what_nobody_uses_is_not_stored_and_has_no_rank(make_arch):
    arch = make_arch(4, attention_bias=True)
    found = build(
        arch, {"from": "pairs"}, fold={**FOLD, "tie": ["mlp"]}, relax={"rank": 4, "at": "all", "vectors": "own"}
    )
    gone = {"k_proj", "v_proj"}
    for index in range(4):
        reads = index % 2 == 1
        assert ({"k_proj", "v_proj"} & part_linears(found, "mixer", index).keys() == set()) == reads
        assert ({"k_proj", "v_proj"} & found.depths[index].ranks.keys() == set()) == reads
        assert ({"k_proj.bias", "v_proj.bias"} & part_vectors(found, "mixer", index).keys() == set()) == reads
        assert ({"k_proj.bias", "v_proj.bias"} & depth_vectors(found, index, "mixer").keys() == set()) == reads
        assert (gone & depth_linears(found, index).keys() == set()) == reads
        assert {"q_proj", "o_proj", "up_proj"} < depth_linears(found, index).keys()
    names = {tensor.name for tensor in target_tensors(found)}
    assert "model.mixers.1.q_proj.weight" in names
    assert not {name for name in names if name.startswith(("model.mixers.1.", "model.depths.1.")) and "k_proj" in name}


def test_a_tied_part_keeps_what_its_first_depth_uses(make_arch):
    found = build(make_arch(4), FIRST, fold=FOLD, relax={"rank": 2})
    assert {"k_proj", "v_proj"} < part_linears(found, "mixer", 0).keys()
    assert {"k_proj", "v_proj"} < found.depths[0].ranks.keys()
    assert not {"k_proj", "v_proj"} & found.depths[2].ranks.keys()


def test_a_budget_is_spent_on_the_linears_that_are_there(make_arch):
    relax = {"rank": {"parameters": 0.2}}
    ranks = [
        build_blueprint(make_arch(4), load_recipe({"fold": FOLD, "relax": relax, **share})).blueprint.depths[0].ranks
        for share in ({}, {"share_kv": FIRST})
    ]
    assert ranks[1]["up_proj"] > ranks[0]["up_proj"]


@pytest.mark.parametrize("init", ["svd", "joint", "zero"])
def test_keys_start_from_the_layers_whose_depths_make_them(make_arch, init):
    arch = make_arch(4)
    recipe = load_recipe({"fold": {**FOLD, "init": "average"}, "relax": {"rank": 2, "init": init}, "share_kv": FIRST})
    built = build_blueprint(arch, recipe)
    made = {tensor.name: tensor.origin(built.blueprint, built.starts) for tensor in target_tensors(built.blueprint)}
    assert made["model.mixers.0.k_proj.weight"].layers == (0,)
    assert made["model.mixers.0.q_proj.weight"].layers == (0, 2)
    assert made["model.mixers.0.k_proj.weight"].how == ("joint" if init == "joint" else "copied")
    assert made["model.depths.0.lora.k_proj.a"].how == ("joint" if init == "joint" else "fresh")


def test_the_cache_holds_what_is_made_and_flops_are_those_that_are_run(make_arch):
    arch = make_arch(6)
    plain = cost(build_blueprint(arch, load_recipe({"fold": FOLD})).blueprint, 2)
    shared = cost(build(arch, FIRST, fold=FOLD), 2)
    assert [each.bytes_per_token for each in plain.cache] == [6 * 2 * 2 * 8 * 2]
    assert [each.bytes_per_token for each in shared.cache] == [3 * 2 * 2 * 8 * 2]
    keys_and_values = 2 * arch.num_key_value_heads * arch.head_dim * arch.hidden_size
    assert plain.flops_per_token - shared.flops_per_token == 3 * 2 * keys_and_values
    assert plain.flops_per_context_token == shared.flops_per_context_token
    assert plain.parameters == shared.parameters
    untied = cost(build(arch, {"from": "pairs"}), 2)
    assert cost(identity_blueprint(arch), 2).parameters - untied.parameters == 3 * keys_and_values
    skipping = cost(build(arch, {"from": {"back": 2}, "heads": [1]}), 2)
    assert [each.bytes_per_token for each in skipping.cache] == [(4 * 2 + 2) * 2 * 8 * 2]


def test_windows_are_priced_apart(make_arch):
    found = build(make_arch(4, "mistral", sliding_window=7), {"from": "pairs"})
    assert [(each.bytes_per_token, each.max_tokens) for each in cost(found, 2).cache] == [(2 * 2 * 2 * 8 * 2, 7)]


REFUSED = [
    (
        {"share_kv": {"from": "last_loop"}},
        r"share_kv\.from: must be first_loop, pairs or \{back: N\} \(got 'last_loop'",
    ),
    ({"share_kv": {"from": "pair"}}, r"share_kv\.from: must be one of first_loop, pairs.* did you mean 'pairs'"),
    ({"share_kv": {}}, r"share_kv\.from: required"),
    ({"share_kv": []}, r"share_kv: must not be empty"),
    ({"share_kv": {"from": {"back": 0}}}, r"share_kv\.from\.back: must be at least 1"),
    ({"share_kv": {"from": "pairs", "heads": [1, 1]}}, r"share_kv\.heads: each entry must occur once"),
    ({"share_kv": [{"depth": 1, "of": 0}]}, r"share_kv\[0\]\.of: unknown key"),
    ({"share_kv": FIRST}, r"share_kv\.from: first_loop needs a block that runs two or more times"),
    ({"share_kv": FIRST, "fold": {"loops": 1}}, r"share_kv\.from: first_loop needs a block"),
    ({"share_kv": {"from": {"back": 6}}}, r"share_kv\.from: two depths with softmax attention, .* \(none are left\)"),
    (
        {"share_kv": {"from": "pairs", "heads": [2]}},
        r"share_kv\.heads: head 2 is out of range \(2 key-value heads: 0\.\.1",
    ),
    ({"share_kv": [{"depth": 1, "from": 0, "heads": [9]}]}, r"share_kv\[0\]\.heads: head 9 is out of range"),
    ({"share_kv": [{"depth": 6, "from": 0}]}, r"share_kv\[0\]: depth 6 is out of range \(6 depths: 0\.\.5\)"),
    ({"share_kv": [{"depth": 2, "from": 2}]}, r"share_kv\[0\]: depth 2 must read from an earlier one \(got 2\)"),
    ({"share_kv": [{"depth": 2, "from": 4}]}, r"share_kv\[0\]: depth 2 must read from an earlier one \(got 4\)"),
    (
        {"share_kv": [{"depth": 2, "from": 0}], "mixers": [{"type": "retention", "depths": [0]}]},
        r"share_kv\[0\]: softmax attention is required at depths 0 and 2 \(depth 0 has retention\); remove this entry",
    ),
    (
        {"share_kv": [{"depth": 2, "from": 0}], "drop": {"attention": {"layers": [2]}}},
        r"share_kv\[0\]: softmax attention is required at depths 0 and 2 \(depth 2 has no attention\)",
    ),
    (
        {"share_kv": {"from": "pairs"}, "mixers": [{"type": "attention", "depths": [1], "window": 4}]},
        r"share_kv\.from: one window is required \(depth 1 looks back 4, depth 0 without end\)",
    ),
    (
        {"share_kv": [{"depth": 2, "from": 0}, {"depth": 2, "from": 1, "heads": [1]}]},
        r"share_kv\[1\]: depth 2 reads head 1 already; name each head once",
    ),
    (
        {"share_kv": FIRST, "fold": FOLD, "relax": {"rank": {"v_prjo": 3}}},
        r"relax\.rank\.v_prjo: must name a linear",
    ),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED, ids=lambda each: str(each)[:80])
def test_what_cannot_be_shared_is_refused(make_arch, sections, message):
    with pytest.raises(RecipeError, match=message):
        build_blueprint(make_arch(6), load_recipe(sections))


def test_ropes_that_differ_cannot_be_shared(make_arch):
    arch = make_arch(3)
    rope = arch.layers[0].rope
    other = arch.layers[0].model_copy(update={"rope": rope.model_copy(update={"theta": 7.0})})
    mixed = arch.model_copy(update={"layers": (arch.layers[0], other, arch.layers[2])})
    with pytest.raises(RecipeError, match=r"share_kv\[0\]: one rotary embedding is required \(depths 1 and 0 have"):
        build(mixed, [{"depth": 1, "from": 0}])


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ([{"depth": 2, "heads": [0]}], r"depths\[2\]\.kv: an earlier depth is required \(got 2\)"),
        ([{"depth": 0, "heads": [0]}], r"depths\[2\]\.kv: a mixer here and at depth 0 is required"),
        ([{"depth": 1, "heads": [2]}], r"depths\[2\]\.kv: head 2 is out of range \(2 key-value heads\)"),
        ([{"depth": 1, "heads": [0, 0]}], r"depths\[2\]\.kv: each head may be read once \(got \[0, 0\]\)"),
        ([{"depth": 3, "heads": [0]}], r"depths\[2\]\.kv: an earlier depth"),
    ],
)
def test_a_blueprint_that_reads_what_is_not_there_is_refused(make_arch, kv, message):
    plain = build_blueprint(make_arch(4), load_recipe({"drop": {"attention": {"layers": [0]}}})).blueprint.model_dump()
    plain["depths"][2]["kv"] = kv
    with pytest.raises(ValidationError, match=message):
        Blueprint.model_validate(plain)


def test_a_blueprint_that_reads_through_another_window_is_refused(make_arch):
    plain = identity_blueprint(make_arch(3)).model_dump()
    plain["depths"][2].update(kv=[{"depth": 1, "heads": [0]}], window=4)
    with pytest.raises(ValidationError, match=r"depths\[2\]\.kv: the window and rotary embedding of depth 1"):
        Blueprint.model_validate(plain)


def test_the_plan_says_who_reads_from_whom(make_arch):
    notes = map(str, build_blueprint(make_arch(4), load_recipe({"share_kv": {"from": "pairs"}})).notes)
    assert "share_kv: keys and values are read: depth 1 from 0, 3 from 2" in notes
    notes = map(str, build_blueprint(make_arch(2), load_recipe({"share_kv": {"from": "pairs", "heads": [1]}})).notes)
    assert "share_kv: keys and values are read: depth 1 from 0 (heads 1)" in notes


def test_a_recipe_survives_its_own_dump(make_arch):
    for share in (FIRST, {"from": {"back": 2}, "heads": [0]}, [{"depth": 1, "from": 0}]):
        recipe = load_recipe({"share_kv": share, "fold": FOLD})
        assert load_recipe(recipe.model_dump(mode="json", exclude_none=True)) == recipe
