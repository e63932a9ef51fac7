"""The picture of a stack has a box for each layer, part and depth, and a line for each use."""

from itertools import pairwise

import pytest

from refold.blueprint.schema import Blueprint
from refold.families.arch import ArchSpec
from refold.planning.build import build_blueprint
from refold.recipe.recipe import Recipe
from refold.report.chart import ChartText
from refold.report.drawing import Box, Stroke
from refold.report.stack import (
    DEPTH_WIDTH,
    HEIGHT,
    PART_WIDTH,
    PITCH,
    describe_depth,
    describe_part,
    draw_stack,
    part_places,
)

TEXT = ChartText("stack", "Stack", "about")
RECIPES = {
    "plain": {},
    "recursive": {"fold": {"loops": 2}, "relax": {"rank": 4}, "exits": {"at": "loops"}},
    "sequence": {"fold": {"loops": 2, "pattern": "sequence"}},
    "dropped": {"drop": {"block": {"layers": [1, 2]}, "mlp": {"layers": [5]}}},
    "low rank": {"factor": {"parameters": 0.5, "weight": "none"}},
}


@pytest.fixture(scope="module")
def arch(make_arch) -> ArchSpec:
    return make_arch(8)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_part_and_every_use_is_drawn(arch: ArchSpec, recipe: dict) -> None:
    blueprint, _, _ = build_blueprint(arch, Recipe.model_validate(recipe).resolved())
    drawn = draw_stack(TEXT, blueprint, 8)
    boxes = [item for item in drawn.items if isinstance(item, Box)]
    parts = [box for box in boxes if box.width == PART_WIDTH]
    assert len(parts) == len(blueprint.mixers) + len(blueprint.mlps)
    assert sum(box.width == DEPTH_WIDTH for box in boxes) == blueprint.num_depths
    lines = [item for item in drawn.items if isinstance(item, Stroke)]
    uses = sum((depth.mixer is not None) + (depth.mlp is not None) for depth in blueprint.depths)
    reads = sum(len(part.sources) for part in (*blueprint.mixers, *blueprint.mlps))
    exits = sum(depth.exit is not None for depth in blueprint.depths)
    assert len(lines) == uses + reads + exits
    unread = [box for box in boxes if box.tip.endswith("not read")]
    assert len(unread) == sum(
        8 - len({layer for part in pool for layer in part.sources}) for pool in (blueprint.mixers, blueprint.mlps)
    )
    for pool in ("mixer", "mlp"):
        depths = [100.0 + PITCH * index for index in range(blueprint.num_depths)]
        places = sorted(part_places(blueprint, pool, depths))
        assert all(two - one >= HEIGHT for one, two in pairwise(places))
        assert depths[0] <= places[0]
        assert places[-1] <= depths[-1]


def test_parts_and_depths_are_described(arch: ArchSpec) -> None:
    def build(recipe: dict) -> Blueprint:
        return build_blueprint(arch, Recipe.model_validate(recipe).resolved())[0]

    recursive = build(RECIPES["recursive"])
    assert list(describe_depth(recursive.depths[3])) == ["LoRA 4", "exit"]
    assert describe_part(recursive, "mixer", 0) == ("0 attention", "")
    name, form = describe_part(build(RECIPES["low rank"]), "mlp", 2)
    assert name == "2 MLP"
    assert form.startswith("rank ")
    dropped = build(RECIPES["dropped"])
    assert [list(describe_depth(dropped.depths[index])) for index in (0, 1, 5)] == [[], ["dropped"], ["no MLP"]]
