"""Rules across sections: for each rule a recipe that breaks it and one that keeps it."""

import pytest

from refold.errors import RecipeError
from refold.planning.rules import RULES, require_rules
from refold.recipe.load import load_recipe

FOLD = {"loops": 2}
BROKEN = [
    (
        {"weights": "fresh", "drop": {"block": {"layers": [2], "replace": "linear"}}},
        r"drop: replace must be none where weights are fresh \(got linear\); remove it",
    ),
    (
        {"fold": {**FOLD, "init": "lower"}, "factor": {"parameters": 0.5, "share": "basis"}},
        r"fold\.init: must be average",
    ),
    ({"calibration": {"order": "sequential"}}, r"calibration\.order: sequential requires .* \(got weight: none\)"),
    (
        {"fold": FOLD, "factor": {"parameters": 0.5, "share": "basis"}, "calibration": {"order": "sequential"}},
        r"calibration\.order: must be at_once where factor\.share is basis",
    ),
    ({"weights": "fresh", "fold": {**FOLD, "align": "both"}}, r"fold\.align: must be none where weights are fresh"),
    (
        {"fold": {**FOLD, "init": "lower", "scale": "norm"}},
        r"fold\.scale: norm requires fold\.init average \(got lower\)",
    ),
    (
        {"fold": {**FOLD, "init": "average", "scale": "norm"}, "relax": {"rank": 2, "init": "svd"}},
        r"fold\.scale: must be none where weights are fitted \(got norm with relax\.init svd",
    ),
    (
        {"weights": "fresh", "fold": FOLD, "relax": {"rank": 2, "init": "svd"}},
        r"relax\.init: must be zero where weights",
    ),
    (
        {"fold": {**FOLD, "init": "random"}, "relax": {"rank": 2, "init": "svd"}},
        r"relax\.init: must be zero where fold\.init is random \(got svd\)",
    ),
    (
        {"fold": {**FOLD, "init": "lower"}, "relax": {"rank": 2, "init": "joint"}},
        r"fold\.init: must be average where relax\.init is joint",
    ),
    (
        {"factor": {"parameters": 0.5}, "calibration": {"order": "sequential", "tokens": 63, "context": 32}},
        r"calibration\.tokens: sequential requires two sequences of 32 tokens.*\(got 63 tokens\)",
    ),
    (
        {
            "fold": FOLD,
            "relax": {"rank": 2, "weight": "fisher"},
            "factor": {"parameters": 0.5, "weight": "activations"},
        },
        r"factor\.weight: must equal relax\.weight \(got activations and fisher\)",
    ),
    (
        {"fold": FOLD, "relax": {"rank": {"energy": 0.5}, "at": "all"}},
        r"relax\.at: must be tied where relax\.rank is measured",
    ),
    (
        {"weights": "fresh", "fold": FOLD, "relax": {"rank": {"energy": 0.5}}},
        r"relax\.rank: a number or a share of parameters is required",
    ),
    (
        {"fold": FOLD, "relax": {"rank": {"energy": 0.5}}, "factor": {"parameters": 0.5}},
        r"relax\.rank\.energy: cannot stand beside factor",
    ),
    (
        {
            "fold": FOLD,
            "relax": {"rank": {"split": "measured"}},
            "factor": {"parameters": 0.5, "split": "measured", "share": "basis"},
        },
        r"relax\.rank\.split: must be even where factor\.share is basis",
    ),
    ({"fold": FOLD, "relax": {"rank": {"split": "measured"}}}, r"relax\.rank\.parameters: a share is required"),
    (
        {"fold": FOLD, "relax": {"rank": {"parameters": 0.1, "split": "measured"}}, "factor": {"parameters": 0.5}},
        r"relax\.rank\.parameters: must be removed beside factor \(got 0\.1\)",
    ),
    (
        {
            "fold": FOLD,
            "relax": {"rank": {"split": "measured"}, "init": "zero"},
            "factor": {"parameters": 0.5, "split": "measured"},
        },
        r"relax\.init: must be joint or svd where relax\.rank is measured",
    ),
    (
        {"width": {"mlp": 0.5, "weight": "fisher"}, "factor": {"parameters": 0.5, "weight": "activations"}},
        r"width\.weight: must equal factor\.weight and relax\.weight \(got activations and fisher\)",
    ),
    (
        {"width": {"mlp": 0.5}, "calibration": {"order": "sequential"}},
        r"calibration\.order: must be at_once beside width",
    ),
    (
        {"weights": "fresh", "width": {"mlp": 0.5, "split": "measured"}},
        r"width\.split: must be even where weights are fresh",
    ),
]


@pytest.mark.parametrize(("sections", "message"), BROKEN, ids=range(len(BROKEN)))
def test_a_recipe_that_breaks_one_rule_is_refused_with_that_rule(make_arch, sections, message):
    with pytest.raises(RecipeError, match=message):
        require_rules(load_recipe(sections).resolved(), make_arch(4))


def test_every_rule_has_a_recipe_that_breaks_it(make_arch):
    recipes = [load_recipe(sections).resolved() for sections, _ in BROKEN]
    unbroken = [
        place for place, rule in enumerate(RULES) if not any(rule.breaks(each, make_arch(4)) for each in recipes)
    ]
    assert unbroken == []


@pytest.mark.parametrize("name", ["recursive", "relaxed", "joint", "lowrank", "compact", "pruned", "narrow"])
def test_built_in_recipes_break_no_rule(make_arch, name):
    require_rules(load_recipe(name).resolved(), make_arch(4))
