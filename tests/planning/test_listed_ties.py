"""Listed ties: the stored parts that they make, their inits, and groups that are refused."""

import pytest

from refold.blueprint.schema import Blueprint
from refold.errors import RecipeError
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe
from refold.sources.measurements import Influence

GROUPS = [{"layers": [2, 4], "tie": ["mlp"]}, {"layers": [0, 1]}]


def build(arch, fold, **recipe) -> Blueprint:
    return build_blueprint(arch, load_recipe({"fold": fold, **recipe})).blueprint


def sources(blueprint: Blueprint) -> tuple[list, list]:
    return [part.sources for part in blueprint.mixers], [part.sources for part in blueprint.mlps]


@pytest.mark.parametrize(
    ("init", "mixer", "mlps"),
    [
        ("average", (0, 1), [(0, 1), (2, 4)]),
        ("stepwise", (0,), [(0,), (2,)]),
        ("lower", (0,), [(0,), (2,)]),
        ("upper", (1,), [(1,), (4,)]),
        ("random", (), [(), ()]),
    ],
)
def test_each_group_is_a_block_of_its_own(make_arch, init: str, mixer, mlps) -> None:
    found = build(make_arch(6), {"groups": GROUPS, "init": init})
    assert sources(found) == ([mixer, (2,), (3,), (4,), (5,)], [*mlps, (3,), (5,)])
    assert [(depth.mixer, depth.mlp) for depth in found.depths] == [(0, 0), (0, 0), (1, 1), (2, 2), (3, 1), (4, 3)]


def test_groups_of_all_neighbours_equal_a_sequence(make_arch) -> None:
    arch = make_arch(6)
    groups = [{"layers": [0, 1]}, {"layers": [2, 3]}, {"layers": [4, 5]}]
    relax = {"rank": 2, "init": "joint"}
    listed = build(arch, {"groups": groups}, relax=relax)
    assert listed == build(arch, {"loops": 2, "pattern": "sequence"}, relax=relax)
    assert listed != build(arch, {"loops": 2}, relax=relax)


def test_only_listed_parts_are_relaxed(make_arch) -> None:
    found = build(make_arch(6), {"groups": GROUPS}, relax={"rank": 2, "vectors": "own"})
    assert [sorted(depth.ranks) for depth in found.depths[3:]] == [
        [],
        ["down_proj", "gate_proj", "up_proj"],
        [],
    ]
    assert len(found.depths[0].ranks) == 7
    assert [depth.vectors for depth in found.depths] == ["own", "own", "own", "tied", "own", "tied"]


def test_one_layer_may_be_tied_with_different_layers_in_each_pool(make_arch) -> None:
    groups = [{"layers": [2, 3], "tie": ["mixer"]}, {"layers": [3, 4, 5], "tie": ["mlp"]}]
    found = build(make_arch(6), {"groups": groups, "init": "average"})
    assert sources(found) == ([(0,), (1,), (2, 3), (4,), (5,)], [(0,), (1,), (2,), (3, 4, 5)])


def test_windows_stay_with_the_depths_and_a_note_says_so(make_arch) -> None:
    sliding = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}
    built = build_blueprint(make_arch(4, "qwen2", **sliding), load_recipe({"fold": {"groups": [{"layers": [1, 2]}]}}))
    assert [depth.window for depth in built.blueprint.depths[1:3]] == [None, 8]
    assert any("a local and a global depth share weights in 1 of 1 tied mixers" in str(note) for note in built.notes)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"fold": {}}, r"fold: exactly one of loops, groups is required \(got none\)"),
        (
            {"fold": {"groups": GROUPS, "loops": 2}},
            r"fold: exactly one of loops, groups is required \(got loops, groups",
        ),
        ({"fold": {"groups": []}}, r"groups: at least one group is required \(got none\); list one, or remove fold"),
        ({"fold": {"groups": GROUPS, "coda": 1}}, r"coda: cannot stand beside groups \(got 1\); remove it"),
        (
            {"fold": {"groups": GROUPS, "pattern": "sequence"}},
            r"pattern: cannot stand beside groups \(got 'sequence'\)",
        ),
        ({"fold": {"groups": GROUPS, "init": [1, 2]}}, r"init: a name is required beside groups \(got \[1, 2\]\)"),
        (
            {"fold": {"groups": [{"layers": [4, 2]}]}},
            r"fold\.groups\[0\]\.layers: must be in the order of the stack, each layer once \(got \[4, 2\]\)$",
        ),
        (
            {"fold": {"groups": [{"layers": [0, 1]}, {"layers": [1, 2], "tie": ["mlp"]}]}},
            r"groups: layer 1 must occur once with mlp \(got two groups\); join them",
        ),
        (
            {"fold": {"groups": [{"layers": [2, 9]}]}},
            r"fold\.groups\[0\]\.layers: layer 9 is out of range \(6 source layers: 0\.\.5\)",
        ),
        (
            {"fold": {"groups": GROUPS}, "drop": {"mlp": {"layers": [4]}}},
            r"fold\.groups\[0\]\.layers: layer 4 must keep its mlp \(got one that is dropped\); remove the layer",
        ),
        ({"fold": {"groups": GROUPS}, "exits": {}}, r"exits\.at: loops needs a block that runs as a whole"),
        ({"fold": {"groups": GROUPS}, "share_kv": {"from": "first_loop"}}, r"share_kv\.from: first_loop needs a block"),
    ],
    ids=lambda each: "" if isinstance(each, str) else str(each),
)
def test_other_groups_are_refused_by_name(make_arch, recipe, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_blueprint(make_arch(6), load_recipe(recipe))


def test_drops_that_are_not_measured_yet_refuse_no_group(make_arch) -> None:
    recipe = load_recipe(
        {"fold": {"groups": [{"layers": [2, 3]}]}, "drop": {"block": {"count": 2, "by": "similarity"}}}
    )
    assert len(build_blueprint(make_arch(6), recipe).blueprint.mixers) < 5
    influence = Influence(block=(9, 1, 8, 7, 0, 9), attention=(1,) * 6, mlp=(1,) * 6)
    assert build_blueprint(make_arch(6), recipe, influence).blueprint.mixers[1].sources == (2,)
    gone = Influence(block=(9, 1, 8, 0, 7, 9), attention=(1,) * 6, mlp=(1,) * 6)
    with pytest.raises(RecipeError, match=r"layer 3 must keep its mixer"):
        build_blueprint(make_arch(6), recipe, gone)
