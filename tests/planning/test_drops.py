"""Drops of layers by influence, and without measurements."""

import pytest

from refold.blueprint.cost import cost, count_parameters
from refold.blueprint.schema import Blueprint
from refold.blueprint.tensors import target_tensors
from refold.errors import RecipeError
from refold.planning.build import build_blueprint, identity_blueprint
from refold.recipe.load import load_recipe
from refold.sources.measurements import Influence

INFLUENCE = Influence(
    block=(0.9, 0.5, 0.1, 0.4, 0.2, 0.8),
    attention=(0.9, 0.01, 0.2, 0.02, 0.5, 0.3),
    mlp=(0.8, 0.5, 0.03, 0.6, 0.1, 0.7),
)


def gone(blueprint: Blueprint) -> tuple[list[int], list[int]]:
    """Depths without attention, and without an MLP."""
    depths = list(enumerate(blueprint.depths))
    return [i for i, each in depths if each.mixer is None], [i for i, each in depths if each.mlp is None]


@pytest.mark.parametrize(
    ("drop", "attention", "mlps"),
    [
        ({"block": {"count": 2, "by": "similarity"}}, [2, 4], [2, 4]),
        ({"block": {"share": 0.5, "by": "auto"}}, [2, 3, 4], [2, 3, 4]),
        ({"attention": {"count": 2, "by": "similarity"}}, [1, 3], []),
        ({"mlp": {"share": 0.5, "by": "similarity"}}, [], [1, 2, 4]),
        ({"sublayers": {"count": 3}}, [1, 3], [2]),
        ({"sublayers": {"share": 0.33}}, [1, 3], [2, 4]),
        ({"block": {"count": 1, "by": "similarity"}, "attention": {"count": 1, "by": "similarity"}}, [1, 2], [2]),
        ({"block": {"layers": [2]}, "sublayers": {"count": 1}}, [1, 2], [2]),
        ({"attention": {"layers": [5], "by": "similarity"}}, [5], []),
    ],
    ids=str,
)
def test_those_go_that_change_the_stream_least(make_arch, drop, attention, mlps) -> None:
    built = build_blueprint(make_arch(6), load_recipe({"drop": drop}), INFLUENCE)
    assert gone(built.blueprint) == (attention, mlps)


@pytest.mark.parametrize("by", ["similarity", "auto"])
def test_unmeasured_they_are_spaced_evenly_and_a_line_says_so(make_arch, by: str) -> None:
    even = build_blueprint(make_arch(6), load_recipe({"drop": {"block": {"count": 2}}}), INFLUENCE)
    built = build_blueprint(make_arch(6), load_recipe({"drop": {"block": {"count": 2, "by": by}}}))
    assert built.blueprint == even.blueprint
    assert "this plan drops evenly spaced parts: give the results of `refold analyse`" in built.notes[0].text
    assert not any("analyse" in note for note in map(str, even.notes))
    measured = build_blueprint(make_arch(6), load_recipe({"drop": {"block": {"count": 2, "by": by}}}), INFLUENCE)
    assert "dropped, by measured influence: layers 2, 4" in map(str, measured.notes)
    assert gone(measured.blueprint) != gone(even.blueprint)


def test_a_parts_norms_go_with_it(make_arch) -> None:
    arch = make_arch(6)
    blueprint = build_blueprint(arch, load_recipe({"drop": {"sublayers": {"count": 3}}}), INFLUENCE).blueprint
    names = {tensor.name for tensor in target_tensors(blueprint)}
    assert sum(name.startswith("model.mixers.") and "input_norm" in name for name in names) == 4
    assert sum(name.startswith("model.mlps.") and "input_norm" in name for name in names) == 5


@pytest.mark.parametrize("drop", [{"block": {"count": 0, "by": "similarity"}}, {"sublayers": {"count": 0}}], ids=str)
def test_dropping_nothing_is_the_identity(make_arch, drop) -> None:
    arch = make_arch(6)
    assert build_blueprint(arch, load_recipe({"drop": drop}), INFLUENCE).blueprint == identity_blueprint(arch)


@pytest.mark.parametrize("influence", [INFLUENCE, None], ids=["measured", "even"])
def test_a_budget_leaves_out_as_few_sublayers_as_fit(make_arch, influence) -> None:
    arch = make_arch(6)
    full = count_parameters(identity_blueprint(arch)).non_embedding
    for share in (1.0, 0.8, 0.5):
        budget = int(share * full)
        built = build_blueprint(arch, load_recipe({"drop": {"sublayers": {"parameters": budget}}}), influence)
        attention, mlps = gone(built.blueprint)
        assert cost(built.blueprint, 2).non_embedding_parameters <= budget
        count = len(attention) + len(mlps)
        assert (count == 0) == (share == 1.0)
        if count:
            fewer = build_blueprint(arch, load_recipe({"drop": {"sublayers": {"count": count - 1}}}), influence)
            assert cost(fewer.blueprint, 2).non_embedding_parameters > budget


def test_a_fold_ties_what_is_left(make_arch) -> None:
    sections = {"fold": {"loops": 2}, "drop": {"attention": {"count": 2, "by": "similarity"}}}
    blueprint = build_blueprint(make_arch(6), load_recipe(sections), INFLUENCE).blueprint
    assert gone(blueprint) == ([1, 3], [])
    assert (len(blueprint.mixers), len(blueprint.mlps)) == (3, 3)


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ({"sublayers": {"count": 13}}, r"drop\.sublayers\.count: must be at most 12 \(got 13\)"),
        ({"sublayers": {"count": 12}}, r"drop\.sublayers: at least one must remain \(all 12 would go\)"),
        ({"sublayers": {"parameters": 10}}, r"drop\.sublayers\.parameters: at least [\d,]+ are required for one of"),
        ({"sublayers": {"count": 1, "share": 0.5}}, r"exactly one of count, share, parameters is required"),
        ({"sublayers": {"count": 1}, "mlp": {"count": 1}}, r"sublayers: cannot stand beside attention or mlp"),
    ],
    ids=str,
)
def test_amounts_that_do_not_fit_are_refused(make_arch, drop, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_blueprint(make_arch(6), load_recipe({"drop": drop}), INFLUENCE)
