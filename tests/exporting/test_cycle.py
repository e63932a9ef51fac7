import pytest

from refold.exporting.cycle import cycle_obstacles, find_cycle
from refold.exporting.unrolled import describe_depths
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe


def _blueprint(arch, recipe):
    blueprint, _, _ = build_blueprint(arch, load_recipe(recipe, ()).resolved(), None)
    return blueprint


@pytest.mark.parametrize(
    ("recipe", "cycle"),
    [
        ({}, (8, 1)),
        ({"fold": {"loops": 2}}, (4, 2)),
        ({"fold": {"loops": 8}}, (1, 8)),
        ({"fold": {"loops": 2, "prelude": 1, "coda": 1}}, (8, 1)),
        ({"fold": {"loops": 2, "tie": ["mlp"]}}, (8, 1)),
    ],
)
def test_the_shortest_block_is_found(recipe, cycle, make_arch):
    blueprint = _blueprint(make_arch(8), recipe)
    found = find_cycle(blueprint)
    assert (found.num_layers, found.num_loops) == cycle
    assert (cycle_obstacles(blueprint) == []) == (found.num_loops > 1)


def test_layers_that_a_fold_drops_do_not_count(make_arch):
    blueprint = _blueprint(make_arch(7), {"fold": {"loops": 2, "uneven": "drop"}})
    empty = [index for index, depth in enumerate(blueprint.depths) if depth.mixer is None]
    found = find_cycle(blueprint)
    assert len(empty) == 1
    assert (found.num_layers, found.num_loops) == (3, 2)
    assert not set(empty) & set(found.depths)
    assert cycle_obstacles(blueprint) == []


@pytest.mark.parametrize(
    ("recipe", "change"),
    [
        ({}, "fold.loops=2"),
        ({"fold": {"loops": 2, "prelude": 1, "coda": 1}}, "fold.uneven=drop without fold.prelude and fold.coda"),
        ({"fold": {"loops": 2}, "relax": {"rank": 2}}, "no relax section"),
        ({"fold": {"loops": 2}, "relax": {"rank": 2, "vectors": "own"}}, "relax.vectors=tied"),
        (
            {"fold": {"loops": 2}, "factor": {"share": "basis", "parameters": 0.6}, "relax": {"rank": 0}},
            "factor.share=none",
        ),
        ({"fold": {"loops": 2}, "drop": {"attention": {"layers": [0]}}}, "no drop"),
    ],
)
def test_the_change_that_makes_a_cycle_is_named(recipe, change, make_arch):
    assert change in [each.change for each in cycle_obstacles(_blueprint(make_arch(8), recipe))]


def test_an_obstacle_names_runs_of_depths(make_arch):
    assert describe_depths([3]) == "depth 3"
    assert describe_depths([1, 2]) == "depths 1, 2"
    assert describe_depths([0, 2, 3, 4, 6, 7]) == "depths 0, 2..4, 6, 7"
    blueprint = _blueprint(make_arch(8), {"fold": {"loops": 2}, "relax": {"rank": 2}})
    assert cycle_obstacles(blueprint)[-1].got == "LoRAs at depths 0..7"
