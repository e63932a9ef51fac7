"""Linears stored as two factors: recipe keys, blueprints and counts."""

import pytest

from refold.blueprint.cost import cost, count_parameters
from refold.blueprint.kinds import FACTOR, LINEAR
from refold.blueprint.owned.coefficients import COEFFICIENTS
from refold.blueprint.owned.lora import LORA
from refold.blueprint.schema import Blueprint, Pool, depth_linears
from refold.blueprint.tensors import target_tensors
from refold.errors import RecipeError
from refold.planning.build import UNMEASURED_RANKS, build_blueprint, identity_blueprint
from refold.planning.factors import linear_budget, lora_parameters, stored_linears, stored_share
from refold.recipe.load import load_recipe

FOLD = {"loops": 2}
MEASURED = {"parameters": 0.5, "split": "measured"}
BASIS = {"parameters": 0.5, "share": "basis"}
REFUSED = [
    (
        {"factor": {"parameters": 0.001}},
        r"factor\.parameters: a share that leaves every stored linear a rank of 1 .*0\.001",
    ),
    (
        {"factor": {"parameters": 0.1}, "fold": FOLD, "relax": {"rank": 32}},
        r"factor\.parameters: .* \(got 0\.1, LoRAs included\); raise it, or lower relax\.rank",
    ),
    (
        {"factor": {"parameters": 0.5, "weight": "none"}, "fold": FOLD, "relax": {"rank": 2, "weight": "fisher"}},
        r"factor\.weight: must equal relax\.weight \(got fisher and none\); remove one of them",
    ),
    (
        {"factor": MEASURED, "fold": FOLD, "relax": {"rank": {"energy": 0.5}}},
        r"relax\.rank\.energy: cannot stand beside factor",
    ),
    (
        {"fold": FOLD, "relax": {"rank": {"split": "measured"}}},
        r"relax\.rank\.parameters: a share is required \(got none\)",
    ),
    (
        {"factor": {"parameters": 0.5}, "fold": FOLD, "relax": {"rank": {"split": "measured"}}},
        r"relax\.rank\.parameters: a share is required .* split both relax\.rank and factor as measured",
    ),
    (
        {"factor": MEASURED, "fold": FOLD, "relax": {"rank": {"parameters": 0.1, "split": "measured"}}},
        r"relax\.rank\.parameters: must be removed beside factor \(got 0\.1\)",
    ),
    (
        {"factor": MEASURED, "fold": FOLD, "relax": {"rank": {"split": "measured"}, "init": "zero"}},
        r"relax\.init: must be joint or svd .* \(got zero\)",
    ),
    (
        {"fold": FOLD, "relax": {"rank": {"energy": 0.5}, "at": "all"}},
        r"relax\.at: must be tied where relax\.rank is measured .* \(got all\)",
    ),
    (
        {"weights": "fresh", "fold": FOLD, "relax": {"rank": {"energy": 0.5}}},
        r"relax\.rank: a number or a share of parameters is required where weights are fresh",
    ),
    (
        {"factor": BASIS},
        r"factor\.share: tied layers are required .* \(no linear is used twice\); add `fold: {loops: 2}`",
    ),
    ({"factor": BASIS, "fold": {"loops": 1}}, r"factor\.share: tied layers are required"),
    (
        {"factor": {**MEASURED, "share": "basis"}, "fold": FOLD, "relax": {"rank": {"split": "measured"}}},
        r"relax\.rank\.split: must be even where factor\.share is basis \(got measured\); give a rank",
    ),
    (
        {"factor": BASIS, "fold": {**FOLD, "init": "stepwise"}},
        r"fold\.init: must be average where factor\.share is basis.*\(got stepwise\); remove fold\.init",
    ),
    (
        {"factor": BASIS, "fold": FOLD, "calibration": {"order": "sequential"}},
        r"calibration\.order: must be at_once where factor\.share is basis \(got sequential\)",
    ),
    ({"factor": {**BASIS, "share": "bases"}, "fold": FOLD}, r"factor\.share: .*did you mean 'basis'"),
    (
        {"factor": {**BASIS, "parameters": 0.001}, "fold": FOLD},
        r"factor\.parameters: a share that leaves every stored linear a rank of 1 .*0\.001",
    ),
    ({"factor": {"parameters": 0}}, r"factor\.parameters: must be above 0"),
    ({"factor": {"parameters": 0.5, "weight": "fischer"}}, r"factor\.weight: .*did you mean 'fisher'"),
    ({"factor": {"parameters": 0.5, "split": "measure"}}, r"factor\.split: .*did you mean 'measured'"),
    ({"fold": FOLD, "relax": {"rank": {"energy": 1.5}}}, r"relax\.rank\.energy: must be at most 1"),
    ({"fold": FOLD, "relax": {"rank": {"energi": 0.5}}}, r"relax\.rank\.energi"),
    ({"calibration": {"token": 5}}, r"calibration\.token: .*did you mean 'tokens'"),
    ({"calibration": {"context": 0}}, r"calibration\.context: "),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED, ids=lambda each: str(each)[:80])
def test_what_does_not_go_together_is_refused(make_arch, sections, message):
    with pytest.raises(RecipeError, match=message):
        build_blueprint(make_arch(6), load_recipe(sections))


@pytest.mark.parametrize(
    ("sections", "weight", "needs_text", "measures"),
    [
        ({}, "none", False, False),
        ({"factor": {"parameters": 0.5}}, "activations", True, False),
        ({"factor": {"parameters": 0.5, "weight": "none"}}, "none", False, False),
        ({"factor": MEASURED, "weights": "fresh"}, "activations", False, False),
        ({"factor": {**MEASURED, "weight": "none"}}, "none", False, True),
        ({"factor": MEASURED, "fold": FOLD, "relax": {"rank": 2, "weight": "fisher"}}, "fisher", True, True),
        ({"fold": FOLD, "relax": {"rank": 2}}, "none", False, False),
        ({"fold": FOLD, "relax": {"rank": {"energy": 0.5}, "weight": "activations"}}, "activations", True, True),
        ({"fold": FOLD, "relax": {"rank": {"parameters": 0.1, "split": "measured"}}}, "none", False, True),
    ],
)
def test_a_recipe_says_whether_it_needs_text_and_measures(sections, weight, needs_text, measures):
    recipe = load_recipe(sections)
    assert (recipe.weight, recipe.needs_text, recipe.measures_ranks) == (weight, needs_text, measures)


@pytest.mark.parametrize("share", [0.3, 0.67])
def test_an_even_split_gives_every_linear_its_share(make_arch, share):
    arch = make_arch(4)
    built = build_blueprint(arch, load_recipe({"factor": {"parameters": share}}))
    for pool, part, name, (rows, columns) in stored_linears(built.blueprint):
        rank = built.blueprint.pool(pool)[part].factors[name]
        assert rank * (rows + columns) <= share * rows * columns < (rank + 1) * (rows + columns)
    assert f"keeps {share:.1%} of every stored linear as two factors" in " ".join(map(str, built.notes))
    assert built.starts.weight == "activations"


def test_a_share_that_holds_all_factorises_nothing(make_arch):
    arch = make_arch(4)
    built = build_blueprint(arch, load_recipe({"fold": FOLD, "factor": {"parameters": 0.5}}))
    assert not any(part.factors for part in (*built.blueprint.mixers, *built.blueprint.mlps))
    assert "factor.parameters: 0.5 is enough to store every linear whole" in map(str, built.notes)
    nothing = {"drop": {"attention": {"share": 1.0}, "mlp": {"share": 1.0}}, "factor": {"parameters": 0.5}}
    assert not list(stored_linears(build_blueprint(arch, load_recipe(nothing)).blueprint))


def test_the_budget_holds_loras_too(make_arch):
    arch = make_arch(4)
    built = build_blueprint(arch, load_recipe({"fold": FOLD, "relax": {"rank": 3}, "factor": {"parameters": 0.4}}))
    blueprint = built.blueprint
    loras = lora_parameters(blueprint)
    assert loras == sum(t.num_elements for t in target_tensors(blueprint) if t.kind is LORA)
    stored = sum(t.num_elements for t in target_tensors(blueprint) if t.kind in (FACTOR, LINEAR))
    budget = linear_budget(identity_blueprint(arch), 0.4)
    # One rank more of everything would not fit.
    assert budget - sum(sum(shape) for *_, shape in stored_linears(blueprint)) < stored + loras <= budget
    queries: set[tuple[Pool, int, str]] = {("mixer", part, "q_proj") for part in range(2)}
    assert lora_parameters(blueprint, skipped=queries) == loras - 4 * 3 * 64


@pytest.mark.parametrize(
    "sections",
    [
        {"factor": {"parameters": 0.5}},
        {"fold": FOLD, "relax": {"rank": 2, "vectors": "own"}, "factor": {"parameters": 0.4}},
        {"fold": FOLD, "factor": {"parameters": 0.3}, "drop": {"mlp": {"layers": [1]}}},
        {"factor": {"parameters": 0.5}, "mixers": [{"type": "retention", "depths": [1]}]},
        {"factor": {"parameters": 0.5}, "share_kv": {"from": "pairs"}},
    ],
    ids=str,
)
def test_factors_are_counted_in_parameters_and_flops(make_arch, sections):
    arch = make_arch(4)
    blueprint = build_blueprint(arch, load_recipe(sections)).blueprint
    whole = build_blueprint(arch, load_recipe({name: each for name, each in sections.items() if name != "factor"}))
    assert count_parameters(blueprint).total == sum(tensor.num_elements for tensor in target_tensors(blueprint))
    saved_parameters = saved_flops = 0
    for pool, part, name, (rows, columns) in stored_linears(blueprint):
        saved = rows * columns - blueprint.pool(pool)[part].factors[name] * (rows + columns)
        idle = {"k_proj", "v_proj"}
        runs = [
            user
            for user in blueprint.users(pool, part)
            if pool == "mlp" or name not in idle or blueprint.made_heads(user)
        ]
        saved_parameters += saved
        saved_flops += 2 * saved * len(runs)
    target, before = cost(blueprint, 2), cost(whole.blueprint, 2)
    assert target.parameters == before.parameters - saved_parameters
    assert target.flops_per_token == before.flops_per_token - saved_flops
    assert target.weight_bytes == 2 * target.parameters


SHARED = {
    "all": {"fold": FOLD},
    "three": {"fold": {"loops": 3, "pattern": "sequence"}},
    "ends": {"fold": {**FOLD, "prelude": 1, "coda": 1}},
    "mixers-alone": {"fold": {**FOLD, "tie": ["mixer"]}},
    "relaxed": {"fold": FOLD, "relax": {"rank": 2}},
    "keys-read": {"fold": FOLD, "share_kv": {"from": "pairs"}},
    "kinds": {"fold": FOLD, "mixers": [{"type": "retention", "depths": [1, 4]}]},
}


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_basis_takes_the_share_and_is_counted(make_arch, name):
    arch = make_arch(6)
    built = build_blueprint(arch, load_recipe({**SHARED[name], "factor": {**BASIS, "parameters": 0.6}}))
    blueprint = built.blueprint
    stored = spent = 0
    for pool, part, linear, (rows, columns) in stored_linears(blueprint):
        users = [
            user
            for user in blueprint.users(pool, part)
            if linear not in ("k_proj", "v_proj") or blueprint.made_heads(user)
        ]
        held = blueprint.pool(pool)[part]
        if len(users) == 1:
            assert linear not in held.bases
            rank = held.factors[linear]
        else:
            assert linear not in held.factors
            rank = held.bases[linear]
        stored += rank * (columns + len(users) * rows)
        # Not sharing a basis saves no FLOPs: every depth projects onto it.
        spent += 2 * len(users) * rank * (columns + rows)
    budget, loras = linear_budget(identity_blueprint(arch), 0.6), lora_parameters(blueprint)
    assert 0.9 * budget < stored + loras <= budget
    assert stored_share(blueprint, identity_blueprint(arch)) == pytest.approx(
        (stored + loras) / (budget / 0.6), rel=1e-3
    )
    tensors = list(target_tensors(blueprint))
    assert stored + loras == sum(each.num_elements for each in tensors if each.kind in (FACTOR, COEFFICIENTS, LORA))
    assert not any(each.kind is LINEAR for each in tensors)
    assert count_parameters(blueprint).total == sum(each.num_elements for each in tensors)
    whole = build_blueprint(arch, load_recipe(SHARED[name])).blueprint
    before = sum(2 * shape[0] * shape[1] for index in range(6) for shape in depth_linears(whole, index).values())
    assert cost(blueprint, 2).flops_per_token == cost(whole, 2).flops_per_token - before + spent
    assert all(depth.vectors == ("tied" if name == "relaxed" else "own") for depth in blueprint.depths[1:-1])
    assert any("tied linears share a basis" in note for note in map(str, built.notes))


def test_a_large_share_stops_at_the_full_rank(make_arch):
    recipe = {"fold": {**FOLD, "prelude": 2}, "factor": {**BASIS, "parameters": 3}}
    blueprint = build_blueprint(make_arch(6), load_recipe(recipe)).blueprint
    for pool, part, linear, (rows, columns) in stored_linears(blueprint):
        tied = len(blueprint.users(pool, part)) > 1
        held = blueprint.pool(pool)[part]
        assert held.bases.get(linear) == (min(columns, 2 * rows) if tied else None)
        assert not held.factors


def test_a_folder_without_bases_is_read_as_ever(make_arch):
    raw = build_blueprint(make_arch(4), load_recipe({"fold": FOLD})).blueprint.model_dump()
    for part in (*raw["mixers"], *raw["mlps"]):
        assert part.pop("bases") == {}
    assert not any(part.bases for part in Blueprint.model_validate(raw).mixers)


def test_a_linear_is_a_basis_or_factors(make_arch):
    raw = build_blueprint(make_arch(4), load_recipe({"fold": FOLD, "factor": BASIS})).blueprint.model_dump()
    raw["mixers"][1]["factors"] = {"q_proj": 2}
    with pytest.raises(
        ValueError, match=r"mixers\[1\]\.bases: linears that are no factors .* \(got \['q_proj'\] as both"
    ):
        Blueprint.model_validate(raw)


def test_what_is_measured_later_is_told(make_arch):
    for sections in (
        {"factor": MEASURED},
        {"fold": FOLD, "relax": {"rank": {"energy": 0.5}}},
        {"factor": MEASURED, "fold": FOLD, "relax": {"rank": {"split": "measured"}, "init": "joint"}},
    ):
        notes = map(str, build_blueprint(make_arch(4), load_recipe(sections)).notes)
        assert any(note.startswith(UNMEASURED_RANKS) for note in notes)
    even = map(str, build_blueprint(make_arch(4), load_recipe({"factor": {"parameters": 0.5}})).notes)
    assert not any(note.startswith(UNMEASURED_RANKS) for note in even)


def test_a_linear_of_rank_0_needs_a_lora_at_every_depth(make_arch):
    built = build_blueprint(make_arch(4), load_recipe({"fold": FOLD, "relax": {"rank": {"q_proj": 2}}})).blueprint
    raw = built.model_dump()
    raw["mixers"][0]["factors"] = {"q_proj": 0}
    assert type(built).model_validate(raw).mixers[0].factors == {"q_proj": 0}
    raw["depths"][2]["ranks"] = {}
    with pytest.raises(ValueError, match=r"mixers\[0\]\.factors\.q_proj: a rank above 0 is required .* \(depths \[2\]"):
        type(built).model_validate(raw)


def test_listed_ranks_are_stored_as_they_are(make_arch):
    recipe = {
        "factor": {"ranks": {"q_proj": [3, "full", 5, 4000], "up_proj": [2, 2, "full", 9]}},
        "drop": {"block": {"layers": [0]}},
    }
    blueprint = build_blueprint(make_arch(4), load_recipe(recipe)).blueprint
    full = min(blueprint.arch.hidden_size, blueprint.arch.head_dim * blueprint.arch.num_attention_heads)
    assert [part.factors for part in blueprint.mixers] == [{}, {"q_proj": 5}, {"q_proj": full}]
    assert [part.factors for part in blueprint.mlps] == [{"up_proj": 2}, {}, {"up_proj": 9}]


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        ({}, r"factor: exactly one of parameters, ranks is required \(got neither\)"),
        ({"parameters": 0.5, "ranks": {"q_proj": [1]}}, r"exactly one of .* \(got parameters and ranks\)"),
        ({"ranks": {"q_proj": [1, 1, 1, 1]}, "multiple": 8}, r"multiple: requires parameters \(got ranks"),
        ({"ranks": {"q_proj": [1, 1, 1, 1]}, "split": "measured"}, r"split: requires parameters \(got ranks"),
        ({"ranks": {"q_proj": [1, 0, 1, 1]}}, r"factor.ranks.q_proj"),
        ({"ranks": {"q_proj": [1, "whole", 1, 1]}}, r"factor.ranks.q_proj"),
        ({"ranks": {}}, r"factor.ranks"),
        ({"ranks": {"q_prj": [1, 1, 1, 1]}}, r"factor.ranks.q_prj: must name a linear: .*; did you mean 'q_proj'\?"),
        ({"ranks": {"q_proj": [1, 1]}}, r"factor.ranks.q_proj: one entry for each of the source's 4 layers .*got 2"),
        ({"parameters": 0.5, "floor": 0.5}, r"floor: requires split: measured \(got even\)"),
        ({"parameters": 0.5, "split": "measured", "floor": 1.5}, r"factor.floor"),
    ],
)
def test_wrong_ranks_and_floors_are_named(make_arch, factor, message):
    with pytest.raises(RecipeError, match=message):
        build_blueprint(make_arch(4), load_recipe({"factor": factor}))
