"""The mixer of each depth, and all errors in a recipe's `mixers`."""

from typing import Any

import pytest

from refold.blueprint.cost import cost
from refold.blueprint.schema import Blueprint
from refold.errors import RecipeError
from refold.mixers.heads import HeadedSpec
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe


def build(arch: Any, *swaps: dict[str, Any], **sections: Any) -> Blueprint:
    return build_blueprint(arch, load_recipe({"mixers": list(swaps), **sections})).blueprint


def types(blueprint: Blueprint) -> str:
    """One letter for each depth's mixer, `.` where it was dropped."""
    return "".join("." if d.mixer is None else blueprint.mixers[d.mixer].mixer.type[0] for d in blueprint.depths)


@pytest.mark.parametrize(
    ("swap", "expected"),
    [
        ({}, "rrrrrrrr"),
        ({"depths": [2, 5]}, "aaraaraa"),
        ({"depths": {"every": 3}}, "raaraara"),
        ({"depths": {"every": 4, "start": 3}}, "aaaraaar"),
        ({"except": "xatl"}, "rararrrr"),
        ({"except": {"every": 4, "start": 3}}, "rrrarrra"),
        ({"except": [0, 7]}, "arrrrrra"),
        ({"depths": "xatl"}, "araraaaa"),
    ],
)
def test_depths_are_chosen_by_rule_or_list(make_arch, swap, expected):
    assert types(build(make_arch(8), {"type": "retention", **swap})) == expected


def test_several_mixers_share_a_stack(make_arch):
    found = build(make_arch(6), {"type": "gla", "depths": [0, 1]}, {"type": "mamba", "depths": [3], "transfer": []})
    assert types(found) == "ggamaa"


def test_windows_and_ropes_stay_with_attention_and_with_mixers_that_turn(make_arch):
    arch = make_arch(4)
    found = build(arch, {"type": "gla", "depths": [0]}, {"type": "retention", "depths": [1]})
    assert found.depths[0].rope is None
    assert found.depths[1].rope == arch.layers[1].rope
    narrow = build(arch, {"type": "attention", "window": 7, "depths": [2]})
    assert [depth.window for depth in narrow.depths] == [None, None, 7, None]
    assert types(narrow) == "aaaa"


def test_what_differs_is_not_tied_and_what_is_alike_is(make_arch):
    found = build(make_arch(8), {"type": "retention", "except": "xatl"}, fold={"loops": 2})
    # Depths 1 and 3 keep attention, so each shares its MLP with 5 and 7 but not its mixer.
    assert types(found) == "rararrrr"
    assert [depth.mlp for depth in found.depths] == [0, 1, 2, 3] * 2
    assert [depth.mixer for depth in found.depths] == [0, 1, 2, 3, 0, 4, 2, 5]
    assert found.mixers[4].sources == (5,)


def test_mlps_are_tied_where_mixers_are_not(make_arch):
    found = build(make_arch(6), {"type": "retention"}, fold={"loops": 2, "tie": ["mlp"]})
    assert len(found.mixers) == 6
    assert len(found.mlps) == 3


def test_a_fresh_mlp_has_no_sources(make_arch):
    found = build(make_arch(4), {"type": "retention", "transfer": [], "depths": [1]})
    assert [part.sources for part in found.mlps] == [(0,), (), (2,), (3,)]


def test_options_are_resolved_against_the_source(make_arch):
    arch = make_arch(4)
    mixer = build(arch, {"type": "retention", "heads": 2}).mixers[0].mixer
    assert isinstance(mixer, HeadedSpec)
    layout = mixer.layout
    assert layout.key_dim == arch.num_attention_heads * arch.head_dim // 2
    assert layout.v_heads == 2


@pytest.mark.parametrize("name", ["retention", "gla", "gated_deltanet", "mamba2", "linear_attention"])
def test_state_replaces_the_cache_and_does_not_grow(make_arch, name):
    found = cost(build(make_arch(4), {"type": name}), 2)
    assert found.cache == ()
    assert found.state_bytes > 0
    assert found.cache_bytes(10) == found.cache_bytes(1_000_000) == found.state_bytes
    assert found.flops_per_context_token == 0


def test_adapters_can_stand_on_untied_parts(make_arch):
    found = build(
        make_arch(4), {"type": "linear_attention"}, relax={"rank": {"q_proj": 2}, "at": "all", "init": "zero"}
    )
    assert all(depth.ranks == {"q_proj": 2} for depth in found.depths)


REFUSED: list[tuple[list[dict[str, Any]], str]] = [
    ([{"type": "retnet"}], r"mixers\[0\]: type: must be one of attention, .*; did you mean 'retention'"),
    ([{}], r"mixers\[0\]: type: must be one of attention"),
    ([{"type": "gla", "decay_rnk": 3}], r"mixers\[0\]\.decay_rnk: unknown key; did you mean 'decay_rank'"),
    ([{"type": "gla", "window": 3}], r"mixers\[0\]\.window: unknown key; must be one of .*decay_rank"),
    ([{"type": "gla", "depths": [6]}], r"mixers\[0\]\.depths: depth 6 is out of range \(6 depths: 0\.\.5\)"),
    ([{"type": "gla", "except": [9]}], r"mixers\[0\]\.except: depth 9 is out of range"),
    ([{"type": "gla", "except": "all"}], r"mixers\[0\]\.depths: at least one depth is required"),
    (
        [{"type": "gla"}, {"type": "mamba", "depths": [1], "transfer": []}],
        r"mixers\[1\]\.depths: depth 1 has a mixer from mixers\[0\] already; name it in `except`",
    ),
    ([{"type": "gla", "heads": 4, "v_heads": 3}], r"mixers\[0\]\.v_heads: must divide the 4 heads of the state"),
    ([{"type": "gla", "heads": 5}], r"mixers\[0\]\.key_dim: required where 5 heads do not divide"),
    (
        [{"type": "retention", "heads": 2, "transfer": "all"}],
        r"mixers\[0\]\.transfer: q_proj cannot be carried over to retention \(the source has \d heads of \d+, this "
        r"mixer 2 of \d+\); leave it out to start it fresh: transfer: \[o_proj, mlp\]",
    ),
    ([{"type": "mamba"}], r"mixers\[0\]\.transfer: o_proj cannot be carried over to mamba \(the source's is \d+ wide"),
    ([{"type": "gla", "transfer": ["wq"]}], r"mixers\[0\]\.transfer\[0\]: must be one of q_proj, k_proj"),
    (
        [{"type": "linear_attention", "feature_map": "elu", "features": 3}],
        r"mixers\[0\]\.features: must be \d+ for elu",
    ),
    ([{"type": "linear_attention", "features": 3}], r"mixers\[0\]\.features: must be even for hedgehog"),
    (
        [{"type": "linear_attention", "feature_map": "favor", "fit": "data_free"}],
        r"mixers\[0\]\.fit: requires a learned",
    ),
    ([{"type": "linear_attention", "window": 4, "normalise": False}], r"mixers\[0\]\.normalise: must be true"),
]


@pytest.mark.parametrize(("swaps", "message"), REFUSED, ids=lambda each: str(each)[:60])
def test_what_does_not_fit_is_refused_with_the_way_out(make_arch, swaps, message):
    with pytest.raises(RecipeError, match=message):
        build(make_arch(6), *swaps)


def test_xatl_needs_four_layers(make_arch):
    with pytest.raises(RecipeError, match=r"mixers\[0\]\.except: xatl requires at least 4 layers \(got 3\)"):
        build(make_arch(3), {"type": "gla", "except": "xatl"})
