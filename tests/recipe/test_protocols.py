import pytest

from refold.errors import RecipeError
from refold.recipe.heal import HealStage, built_in_protocols, expand_protocol, scale_stages
from refold.recipe.load import load_recipe


@pytest.mark.parametrize("name", list(built_in_protocols()))
def test_every_protocol_reads_as_stages_that_use_up_the_budget(name):
    stages = load_recipe({"heal": {"protocol": name, "tokens": "10M"}}).heal
    assert sum(stage.tokens for stage in stages) == 10_000_000
    assert built_in_protocols()[name]


def test_keys_beside_the_budget_go_into_every_stage():
    stages = load_recipe({"heal": {"protocol": "align-then-distil", "tokens": 1000, "context": 64, "seed": 3}}).heal
    assert [list(stage.objective.chosen()) for stage in stages] == [["mixer_outputs"], ["distil"], ["next_token"]]
    assert [stage.tokens for stage in stages] == [200, 600, 200]
    assert {(stage.context, stage.seed) for stage in stages} == {(64, 3)}


def test_a_recipe_goes_through_its_dump_unchanged():
    recipe = load_recipe({"heal": {"protocol": "xatl", "tokens": 1000}})
    assert load_recipe(recipe.model_dump(mode="json")) == recipe


def test_the_short_forms_of_an_objective():
    def chosen(objective):
        (stage,) = load_recipe({"heal": [{"tokens": 1, "objective": objective}]}).heal
        return {name: options.weight for name, options in stage.objective.chosen().items()}

    assert chosen("next_token") == {"next_token": 1.0}
    assert chosen(["distil", "hidden_states"]) == {"distil": 1.0, "hidden_states": 1.0}
    assert chosen({"distil": None, "next_token": 0.25}) == {"next_token": 0.25}
    assert chosen({"hidden_states": {"weight": 2, "inputs": "student"}}) == {"hidden_states": 2.0}


def test_stages_keep_their_shares_of_another_budget():
    stages = [HealStage(tokens=10), HealStage(tokens=30)]
    assert [stage.tokens for stage in scale_stages(stages, 1000)] == [250, 750]


def test_a_budget_too_small_for_a_share_still_gives_it_a_token():
    assert [stage["tokens"] for stage in expand_protocol("align-then-distil", 2)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"protocol": "distill", "tokens": 10}, r"protocol must be one of .* \(got 'distill'\); did you mean 'distil'"),
        ({"protocol": "distil"}, r"protocol distil: requires `tokens`, such as 20M \(got None\)"),
        ({"protocol": {"a": 1}, "tokens": 10}, r"protocol must be one of .* \(got \{'a': 1\}\)"),
        ({"protocol": ["distil"], "tokens": 10}, r"protocol must be one of .* \(got \['distil'\]\)"),
        ({"protocol": "distil", "tokens": {"a": 1}}, r"requires `tokens`, such as 20M \(got \{'a': 1\}\)"),
        (
            {"tokens": 10, "seed": 3},
            r"must be a list of stages, or a mapping with `protocol` .*keys tokens, seed",
        ),
    ],
)
def test_a_section_that_cannot_be_expanded_is_refused(section, says):
    with pytest.raises(RecipeError, match=says):
        load_recipe({"heal": section})
