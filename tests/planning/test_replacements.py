"""Runs of dropped parts, the part before each that takes the linear map, and runs that no part can take."""

import pytest

from refold.blueprint.origins import Replacement
from refold.errors import RecipeError
from refold.planning.build import build_blueprint
from refold.planning.plan import plan
from refold.recipe.load import load_recipe
from refold.sources.measurements import Influence

INFLUENCE = Influence(
    block=(0.9, 0.5, 0.1, 0.4, 0.2, 0.8),
    attention=(0.9, 0.01, 0.2, 0.02, 0.5, 0.3),
    mlp=(0.8, 0.5, 0.03, 0.6, 0.1, 0.7),
)
LINEAR = {"replace": "linear"}


def replaced(arch, recipe, influence: Influence | None = None) -> list[str]:
    return [each.describe() for each in build_blueprint(arch, load_recipe(recipe), influence).starts.replacements]


@pytest.mark.parametrize(
    ("drop", "expected"),
    [
        (
            {"block": {"layers": [2, 3], **LINEAR}},
            [
                "attention of layer 2, the MLP of layer 2, attention of layer 3, the MLP of layer 3, folded into "
                "down_proj of layer 1"
            ],
        ),
        (
            {"attention": {"layers": [1, 2], **LINEAR}},
            [
                "attention of layer 1, folded into down_proj of layer 0",
                "attention of layer 2, folded into down_proj of layer 1",
            ],
        ),
        ({"mlp": {"layers": [3], **LINEAR}}, ["the MLP of layer 3, folded into o_proj of layer 3"]),
        # A run is replaced as a whole, also with parts that are dropped without a map; other runs are not.
        (
            {"mlp": {"layers": [3], **LINEAR}, "attention": {"layers": [1, 4]}},
            ["the MLP of layer 3, attention of layer 4, folded into o_proj of layer 3"],
        ),
        ({"mlp": {"layers": [3]}}, []),
        # Nothing stands before the attention of layer 0; only the listed parts need a part that takes a map.
        (
            {"attention": {"layers": [0, 2], "replace": [2]}},
            ["attention of layer 2, folded into down_proj of layer 1"],
        ),
        (
            {"block": {"layers": [0, 3], "replace": [3]}},
            ["attention of layer 3, the MLP of layer 3, folded into down_proj of layer 2"],
        ),
    ],
    ids=str,
)
def test_the_part_before_a_run_takes_its_map(make_arch, drop, expected) -> None:
    assert replaced(make_arch(6), {"drop": drop}) == expected


def test_measured_drops_are_replaced_when_they_are_known(make_arch) -> None:
    drop = {"sublayers": {"count": 3, **LINEAR}}
    expected = [
        "attention of layer 1, folded into down_proj of layer 0",
        "the MLP of layer 2, attention of layer 3, folded into o_proj of layer 2",
    ]
    assert replaced(make_arch(6), {"drop": drop}, INFLUENCE) == expected
    assert replaced(make_arch(6), {"drop": drop}) == []


def test_behind_an_output_norm_the_norm_takes_the_map(make_arch) -> None:
    arch = make_arch(6, "olmo2")
    found = build_blueprint(arch, load_recipe({"drop": {"mlp": {"layers": [3], **LINEAR}}})).starts.replacements
    assert found == (Replacement(pool="mixer", layer=3, gone=((3, "mlp"),), into="output_norm"),)
    assert found[0].describe() == "the MLP of layer 3, folded into output_norm of attention of layer 3"


def test_of_parts_that_read_one_input_the_kept_one_stands_before(make_arch) -> None:
    arch = make_arch(6, "gpt_neox")
    assert replaced(arch, {"drop": {"attention": {"layers": [2], **LINEAR}}}) == [
        "attention of layer 2, folded into down_proj of layer 2"
    ]
    # With one input after the other it is the MLP of the layer before.
    assert replaced(make_arch(6), {"drop": {"attention": {"layers": [2], **LINEAR}}}) == [
        "attention of layer 2, folded into down_proj of layer 1"
    ]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"drop": {"block": {"layers": [0], **LINEAR}}},
            r"drop\.block\.replace: attention or an MLP before the dropped parts is required \(got attention of layer "
            r"0, the MLP of layer 0 at the beginning of the stack\); keep the first of them, or set replace to none",
        ),
        (
            {"drop": {"sublayers": {"count": 1, "by": "similarity", **LINEAR}}},
            r"drop\.sublayers\.replace: before attention of layer 1, .* \(got the MLP of layer 0: tied in layers \[0, "
            r"3\]\); drop other parts",
        ),
        (
            {"drop": {"mlp": {"layers": [2], **LINEAR}}, "mixers": [{"type": "retention", "depths": [2]}]},
            r"drop\.mlp\.replace: before the MLP of layer 2, .* \(got attention of layer 2: it becomes retention\)",
        ),
        (
            {"weights": "fresh", "drop": {"mlp": {"layers": [2], **LINEAR}}},
            r"drop: replace must be none where weights are fresh \(got linear\); remove it",
        ),
        (
            {"drop": {"mlp": {"layers": [2], "replace": "linera"}}},
            r"drop\.mlp\.replace: must be one of none, linear or a list \(got 'linera'\)",
        ),
        (
            {"drop": {"mlp": {"layers": [2, 3], "replace": [3, 4]}}},
            r"drop\.mlp: replace: layers that `layers` lists are required \(got 4\); list it there too, or write",
        ),
        (
            {"drop": {"attention": {"count": 2, "replace": [1]}}},
            r"drop\.attention: replace: layers that `layers` lists are required \(got 1\)",
        ),
    ],
    ids=["first", "tied", "mixer", "fresh", "unknown", "unlisted", "counted"],
)
def test_what_cannot_be_replaced_is_refused_by_name(make_arch, recipe, message: str) -> None:
    if "sublayers" in recipe["drop"]:
        recipe = {**recipe, "fold": {"groups": [{"layers": [0, 3], "tie": ["mlp"]}]}}
    with pytest.raises(RecipeError, match=message):
        build_blueprint(make_arch(6), load_recipe(recipe), INFLUENCE)


def test_a_part_whose_weights_make_another_part_takes_no_map(make_arch) -> None:
    fold = {"loops": 2, "prelude": 2, "coda": 2, "init": [1]}
    with pytest.raises(RecipeError, match=r"got the MLP of layer 1: its weights are others'"):
        build_blueprint(
            make_arch(6), load_recipe({"fold": fold, "drop": {"attention": {"layers": [2], **LINEAR}}}), None
        )


def test_a_plan_names_the_tensors_that_hold_maps(make_source) -> None:
    made = plan(make_source("llama"), {"drop": {"attention": {"layers": [2], **LINEAR}}})
    mapped = [line for line in made.lines if line.how == "mapped"]
    assert [(line.tensors, line.layers, line.reason) for line in mapped] == [
        ("model.mlps.*.down_proj.weight", (1,), "times the linear map in place of dropped parts")
    ]
    assert "drop: a linear map in place of attention of layer 2, folded into down_proj of layer 1" in map(
        str, made.notes
    )
    assert made.calibration == "required"
    plain = plan(make_source("llama"), {"drop": {"attention": {"layers": [2]}}})
    assert not [line for line in plain.lines if line.how == "mapped"]
    assert plain.calibration == "unused"
    factored = plan(
        make_source("llama"), {"drop": {"attention": {"layers": [2], **LINEAR}}, "factor": {"parameters": 0.5}}
    )
    assert [line.layers for line in factored.lines if line.reason.endswith("in place of dropped parts")] == [(1,)] * 2
