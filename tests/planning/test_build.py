from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refold.blueprint.cost import cost
from refold.blueprint.schema import POOLS, Blueprint, depth_linears
from refold.errors import RecipeError
from refold.planning.build import build_blueprint, identity_blueprint
from refold.planning.factors import linear_budget, stored_linears
from refold.recipe.load import built_in_recipes, load_recipe


def _build(arch, sections: Mapping[str, Any]) -> Blueprint:
    return build_blueprint(arch, load_recipe(sections)).blueprint


def _stack(blueprint: Blueprint) -> list[tuple[int | None, int | None]]:
    return [(depth.mixer, depth.mlp) for depth in blueprint.depths]


def _sources(blueprint: Blueprint) -> list[tuple[int, ...]]:
    assert [part.sources for part in blueprint.mixers] == [part.sources for part in blueprint.mlps]
    return [part.sources for part in blueprint.mixers]


def test_the_empty_recipe_is_the_identity(make_arch):
    arch = make_arch(4)
    built = build_blueprint(arch, load_recipe())
    assert built.blueprint == identity_blueprint(arch)
    assert _stack(built.blueprint) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert built.notes == ()
    assert built.starts.lora is None


@pytest.mark.parametrize(
    ("fold", "stack", "sources"),
    [
        ({"pattern": "cycle"}, [0, 1, 2, 0, 1, 2], [(0, 3), (1, 4), (2, 5)]),
        ({"pattern": "sequence"}, [0, 0, 1, 1, 2, 2], [(0, 1), (2, 3), (4, 5)]),
        ({"pattern": "cycle_reversed"}, [0, 1, 2, 2, 1, 0], [(0, 5), (1, 4), (2, 3)]),
        ({"loops": 3, "pattern": "cycle_reversed"}, [0, 1, 1, 0, 0, 1], [(0, 3, 4), (1, 2, 5)]),
        ({"init": "stepwise"}, [0, 1, 2, 0, 1, 2], [(0,), (2,), (5,)]),
        ({"init": "stepwise", "pattern": "sequence"}, [0, 0, 1, 1, 2, 2], [(0,), (2,), (5,)]),
        ({"init": "lower"}, [0, 1, 2, 0, 1, 2], [(0,), (1,), (2,)]),
        ({"init": "upper"}, [0, 1, 2, 0, 1, 2], [(3,), (4,), (5,)]),
        ({"init": "random"}, [0, 1, 2, 0, 1, 2], [(), (), ()]),
        ({"init": [5, 0, 5]}, [0, 1, 2, 0, 1, 2], [(5,), (0,), (5,)]),
        ({"prelude": 1, "coda": 1}, [0, 1, 2, 1, 2, 3], [(0,), (1, 3), (2, 4), (5,)]),
        ({"prelude": 2, "init": "stepwise"}, [0, 1, 2, 3, 2, 3], [(0,), (1,), (2,), (5,)]),
        ({"prelude": 1, "uneven": "prelude"}, [0, 1, 2, 3, 2, 3], [(0,), (1,), (2, 4), (3, 5)]),
        ({"loops": 1}, [0, 1, 2, 3, 4, 5], [(0,), (1,), (2,), (3,), (4,), (5,)]),
        ({"loops": 6}, [0, 0, 0, 0, 0, 0], [(0, 1, 2, 3, 4, 5)]),
    ],
)
def test_fold_ties_and_starts_as_the_recipe_says(make_arch, fold, stack, sources):
    blueprint = _build(make_arch(6), {"fold": {"loops": 2, "init": "average", **fold}})
    assert _stack(blueprint) == [(part, part) for part in stack]
    assert _sources(blueprint) == sources
    assert [depth.source for depth in blueprint.depths] == list(range(6))


@pytest.mark.parametrize("pool", ["mixer", "mlp"])
def test_what_is_not_tied_keeps_one_part_for_each_layer(make_arch, pool):
    blueprint = _build(make_arch(4), {"fold": {"loops": 2, "tie": [pool], "init": "average"}})
    other = "mlp" if pool == "mixer" else "mixer"
    assert [part.sources for part in blueprint.pool(pool)] == [(0, 2), (1, 3)]
    assert [part.sources for part in blueprint.pool(other)] == [(0,), (1,), (2,), (3,)]


def test_random_leaves_untied_layers_as_they_are(make_arch):
    blueprint = _build(make_arch(6), {"fold": {"loops": 2, "prelude": 1, "coda": 1, "init": "random"}})
    assert _sources(blueprint) == [(0,), (), (), (5,)]


def test_surplus_layers_are_left_out_evenly(make_arch):
    built = build_blueprint(make_arch(7), load_recipe({"fold": {"loops": 3, "uneven": "drop", "init": "average"}}))
    # round(linspace(0, 6, 6)) keeps 0 1 2 4 5 6.
    assert _stack(built.blueprint) == [(0, 0), (1, 1), (0, 0), (None, None), (1, 1), (0, 0), (1, 1)]
    assert _sources(built.blueprint) == [(0, 2, 5), (1, 4, 6)]
    assert any("dropped [3]" in note for note in map(str, built.notes))


def test_surplus_layers_go_into_the_prelude(make_arch):
    built = build_blueprint(make_arch(7), load_recipe({"fold": {"loops": 3, "uneven": "prelude", "init": "average"}}))
    assert _sources(built.blueprint) == [(0,), (1, 3, 5), (2, 4, 6)]
    assert any("prelude is 1" in note for note in map(str, built.notes))


def test_blocks_are_dropped_before_anything_is_tied(make_arch):
    blueprint = _build(make_arch(6), {"drop": {"block": {"layers": [1, 4]}}, "fold": {"loops": 2, "init": "average"}})
    assert _stack(blueprint) == [(0, 0), (None, None), (1, 1), (0, 0), (None, None), (1, 1)]
    assert _sources(blueprint) == [(0, 3), (2, 5)]


def test_an_even_drop_keeps_first_and_last(make_arch):
    blueprint = _build(make_arch(6), {"drop": {"block": {"share": 0.5}}})
    assert [index for index, depth in enumerate(blueprint.depths) if depth.mixer is not None] == [0, 2, 5]
    assert _sources(blueprint) == [(0,), (2,), (5,)]


def test_a_budget_keeps_as_many_blocks_as_fit(make_arch):
    arch = make_arch(8)
    strict = cost(_build(arch, {"fold": {"loops": 2}}), 2)
    exact = _build(arch, {"drop": {"block": {"parameters": strict.non_embedding_parameters}}})
    assert cost(exact, 2).non_embedding_parameters == strict.non_embedding_parameters
    short = _build(arch, {"drop": {"block": {"parameters": strict.non_embedding_parameters - 1}}})
    assert len(short.mixers) == len(exact.mixers) - 1
    assert _build(arch, {"drop": {"block": {"parameters": "1B"}}}) == identity_blueprint(arch)


def test_dropped_parts_are_not_stored_and_tied_ones_are_made_from_their_users(make_arch):
    blueprint = _build(
        make_arch(6),
        {"drop": {"attention": {"layers": [1, 4, 5]}}, "fold": {"loops": 2, "init": "average"}, "relax": {"rank": 3}},
    )
    assert _stack(blueprint) == [(0, 0), (None, 1), (1, 2), (0, 0), (None, 1), (None, 2)]
    assert [part.sources for part in blueprint.mixers] == [(0, 3), (2,)]
    assert [part.sources for part in blueprint.mlps] == [(0, 3), (1, 4), (2, 5)]
    # Depth 2 alone uses its mixer: nothing was lost, so nothing is to be relaxed.
    assert "q_proj" in blueprint.depths[0].ranks
    assert set(blueprint.depths[2].ranks) == {"gate_proj", "up_proj", "down_proj"}


def test_a_part_with_one_user_is_that_depths_own_under_stepwise_too(make_arch):
    blueprint = _build(make_arch(6), {"drop": {"mlp": {"layers": [1]}}, "fold": {"loops": 2, "init": "stepwise"}})
    assert [part.sources for part in blueprint.mixers] == [(0,), (2,), (5,)]
    assert [part.sources for part in blueprint.mlps] == [(0,), (5,), (4,)]


def test_drops_count_among_the_depths_that_remain(make_arch):
    blueprint = _build(make_arch(6), {"drop": {"block": {"layers": [0]}, "mlp": {"count": 2}}})
    # Of layers 1..5 round(linspace(0, 4, 3)) keeps 1, 3, 5.
    assert [depth.mlp for depth in blueprint.depths] == [None, 0, None, 1, None, 2]


def test_fresh_weights_come_from_no_layer(make_arch):
    built = build_blueprint(make_arch(4), load_recipe("scratch"))
    assert _sources(built.blueprint) == [(), ()]
    assert built.starts.weights == "fresh"


def test_windows_and_ropes_stay_with_their_depths(make_arch):
    arch = make_arch(4, "mistral", sliding_window=8)
    layers = (arch.layers[0], *(layer.model_copy(update={"window": None}) for layer in arch.layers[1:]))
    blueprint = _build(arch.model_copy(update={"layers": layers}), {"fold": {"loops": 2}})
    assert [depth.window for depth in blueprint.depths] == [8, None, None, None]
    assert all(depth.rope == arch.layers[0].rope for depth in blueprint.depths)


@pytest.mark.parametrize(
    ("rank", "ranks"),
    [
        (7, {"q_proj": 7, "k_proj": 7, "v_proj": 7, "o_proj": 7, "gate_proj": 7, "up_proj": 7, "down_proj": 7}),
        (20, {"q_proj": 20, "k_proj": 16, "v_proj": 16, "o_proj": 20, "gate_proj": 20, "up_proj": 20, "down_proj": 20}),
        (
            "full",
            {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32, "gate_proj": 32, "up_proj": 32, "down_proj": 32},
        ),
        ({"q_proj": 5}, {"q_proj": 5}),
        ({"mixer": 3, "q_proj": 5, "k_proj": 0}, {"q_proj": 5, "v_proj": 3, "o_proj": 3}),
        (
            {"all": 2, "mlp": "full", "down_proj": 4, "mixer": 1},
            {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 1, "gate_proj": 32, "up_proj": 32, "down_proj": 4},
        ),
        (0, {}),
    ],
)
def test_ranks_are_capped_and_the_more_specific_name_wins(make_arch, rank, ranks):
    blueprint = _build(make_arch(4), {"fold": {"loops": 2}, "relax": {"rank": rank}})
    assert [depth.ranks for depth in blueprint.depths] == [ranks] * 4


def test_only_tied_depths_are_relaxed_and_keep_vectors(make_arch):
    relax = {"rank": 2, "vectors": "own"}
    blueprint = _build(make_arch(6), {"fold": {"loops": 2, "prelude": 1, "coda": 1}, "relax": relax})
    assert [bool(depth.ranks) for depth in blueprint.depths] == [False, True, True, True, True, False]
    assert [depth.vectors for depth in blueprint.depths] == ["tied", "own", "own", "own", "own", "tied"]
    tied_mixers = _build(make_arch(4), {"fold": {"loops": 2, "tie": ["mixer"]}, "relax": relax})
    assert set(tied_mixers.depths[0].ranks) == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("share", [0.06, 0.15, 0.5])
@pytest.mark.parametrize("fold", [{}, {"tie": ["mlp"]}, {"prelude": 1, "coda": 1}])
def test_a_share_buys_the_largest_uniform_rank_that_fits(make_arch, share, fold):
    arch = make_arch(8)
    budget = share * cost(identity_blueprint(arch), 2).non_embedding_parameters
    strict = cost(_build(arch, {"fold": {"loops": 2, **fold}}), 2).non_embedding_parameters
    built = build_blueprint(arch, load_recipe({"fold": {"loops": 2, **fold}, "relax": {"rank": {"parameters": share}}}))
    rank = max(rank for depth in built.blueprint.depths for rank in depth.ranks.values())

    def spent(rank: int) -> int:
        relaxed = _build(arch, {"fold": {"loops": 2, **fold}, "relax": {"rank": rank}})
        return cost(relaxed, 2).non_embedding_parameters - strict

    assert spent(rank) <= budget
    assert rank == 32 or spent(rank + 1) > budget
    assert any(f"is rank {rank} " in note for note in map(str, built.notes))


@pytest.mark.parametrize(
    ("pattern", "loops", "fold", "exits"),
    [
        ("cycle", 2, {}, [3]),
        ("cycle", 4, {}, [1, 3, 5]),
        ("cycle_reversed", 2, {}, [3]),
        ("cycle", 2, {"prelude": 1, "coda": 1}, [3, 6]),
    ],
)
def test_exits_stand_after_each_loop_but_the_end(make_arch, pattern, loops, fold, exits):
    recipe = {"fold": {"loops": loops, "pattern": pattern, **fold}, "exits": {"at": "loops"}}
    blueprint = _build(make_arch(8), recipe)
    assert [index for index, depth in enumerate(blueprint.depths) if depth.exit] == exits


def test_exits_stand_where_they_are_listed(make_arch):
    blueprint = _build(make_arch(4), {"exits": {"at": [2, 0]}})
    assert [index for index, depth in enumerate(blueprint.depths) if depth.exit] == [0, 2]


def test_measured_pairs_are_told_and_recommended_ones_are_not(make_arch):
    def notes(init: str, relax: dict | None) -> str:
        sections = {"fold": {"loops": 2, "init": init}, **({"relax": {"rank": 2, **relax}} if relax else {})}
        return " ".join(map(str, build_blueprint(make_arch(4), load_recipe(sections)).notes))

    assert "average without LoRAs had 46.7, stepwise 51.7" in notes("average", None)
    assert "lower without LoRAs had 47.1" in notes("lower", None)
    assert "stepwise + svd had 50.5 at rank 512, stepwise + zero 53.1" in notes("stepwise", {"init": "svd"})
    assert "average + zero had 49.0 at rank 512, average + svd 55.5" in notes("average", {"init": "zero"})
    assert notes("stepwise", None) == ""
    assert notes("average", {"init": "svd"}) == ""
    assert notes("stepwise", {"init": "zero"}) == ""


def test_a_rank_for_what_is_not_tied_is_told(make_arch):
    sections = {"fold": {"loops": 2, "tie": ["mlp"]}, "relax": {"rank": {"mixer": 2, "mlp": 3}}}
    assert "relax.rank.mixer: has no effect, no mixer is tied" in map(
        str, build_blueprint(make_arch(4), load_recipe(sections)).notes
    )


FOLD2 = {"loops": 2}
REFUSED = [
    (
        {"fold": {"loops": 4}},
        r"fold\.loops: must divide the layers of the block \(got 6 layers and 4 loops, 2 too many\)",
    ),
    ({"fold": {"loops": 4}}, r"set fold\.uneven to drop or prelude"),
    (
        {"fold": {"loops": 7, "uneven": "drop"}},
        r"fold\.loops: a block of at least 7 layers is required \(got 6: 6 layers",
    ),
    ({"fold": {"loops": 2, "prelude": 4, "coda": 4}}, r"fold\.loops: a block of at least 2 layers is required \(got 0"),
    ({"fold": {**FOLD2, "init": [0, 1]}}, r"fold\.init: one source layer for each of the 3 stored layers .* \(got 2\)"),
    ({"fold": {**FOLD2, "init": [0, 1, 6]}}, r"fold\.init: layer 6 is out of range \(6 source layers: 0\.\.5\)"),
    ({"relax": {"rank": 2}}, r"relax: tied layers are required \(no part is used twice\); set fold\.loops to 2"),
    ({"relax": {"rank": 2}, "fold": {"loops": 1}}, r"relax: tied layers are required"),
    (
        {"fold": FOLD2, "relax": {"rank": {"q_pro": 2}}},
        r"relax\.rank\.q_pro: must name a linear or a group: q_proj, .*, all; did you mean 'q_proj'",
    ),
    (
        {"fold": FOLD2, "relax": {"rank": {"parameters": 0.001}}},
        r"relax\.rank\.parameters: at least [\d,]+ parameters are required for rank 1 \(got 0\.001 of",
    ),
    ({"fold": FOLD2, "weights": "fresh", "relax": {"rank": 2, "init": "svd"}}, r"must be zero where weights are fresh"),
    (
        {"fold": {**FOLD2, "init": "random"}, "relax": {"rank": 2, "init": "joint"}},
        r"relax\.init: must be zero where fold\.init is random \(got joint\)",
    ),
    (
        {"fold": {**FOLD2, "init": "lower"}, "relax": {"rank": 2, "init": "joint"}},
        r"fold\.init: must be average where relax\.init is joint.*\(got lower\)",
    ),
    ({"drop": {"block": {"count": 6}}}, r"drop\.block: at least one layer must remain \(all 6 would go\)"),
    ({"drop": {"block": {"count": 7}}}, r"drop\.block\.count: must be at most 6 \(got 7\)"),
    ({"drop": {"block": {"layers": [6]}}}, r"drop\.block\.layers: layer 6 is out of range \(6 source layers: 0\.\.5\)"),
    ({"drop": {"block": {"parameters": "1k"}}}, r"drop\.block\.parameters: at least [\d,]+ are required for one layer"),
    (
        {"drop": {"block": {"layers": [2]}, "mlp": {"layers": [2]}}},
        r"drop\.mlp\.layers: layer 2 is dropped already; remove it from the list",
    ),
    (
        {"drop": {"block": {"layers": [2]}, "attention": {"count": 6}}},
        r"drop\.attention\.count: must be at most 5",
    ),
    ({"exits": {"at": "loops"}}, r"exits\.at: loops needs a block that runs as a whole two or more times"),
    ({"exits": {"at": "loops"}, "fold": {**FOLD2, "pattern": "sequence"}}, r"exits\.at: loops needs a block"),
    ({"exits": {"at": [5]}}, r"exits\.at: depth 5 is out of range \(an exit is before the last of 6 depths: 0\.\.4\)"),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED, ids=lambda each: str(each)[:80])
def test_a_recipe_that_does_not_fit_the_source_is_refused(make_arch, sections, message):
    with pytest.raises(RecipeError, match=message):
        build_blueprint(make_arch(6), load_recipe(sections))


@pytest.mark.parametrize("name", built_in_recipes())
@pytest.mark.parametrize("num_layers", [5, 6])
def test_built_in_recipes_fit_odd_and_even_stacks(make_arch, name, num_layers):
    build_blueprint(make_arch(num_layers), load_recipe(name))


FOLDS = st.fixed_dictionaries(
    {"loops": st.integers(1, 4), "uneven": st.sampled_from(["drop", "prelude"])},
    optional={
        "pattern": st.sampled_from(["cycle", "sequence", "cycle_reversed"]),
        "init": st.sampled_from(["stepwise", "average", "lower", "upper", "random"]),
        "tie": st.sampled_from([["mixer"], ["mlp"], ["mlp", "mixer"]]),
        "prelude": st.integers(0, 2),
        "coda": st.integers(0, 2),
    },
)
RANKS = st.one_of(
    st.integers(0, 40),
    st.just("full"),
    st.fixed_dictionaries({"parameters": st.floats(0.02, 1.0)}, optional={"split": st.just("measured")}),
    st.just({"split": "measured"}),
    st.fixed_dictionaries({"energy": st.floats(0.1, 1.0)}),
    st.dictionaries(st.sampled_from(["q_proj", "down_proj", "mixer", "mlp", "all"]), st.integers(0, 40), min_size=1),
)
DROPS = st.one_of(
    st.fixed_dictionaries({"count": st.integers(0, 3)}),
    st.fixed_dictionaries({"share": st.floats(0, 0.6)}),
    st.fixed_dictionaries({"layers": st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True)}),
)
RECIPES = st.fixed_dictionaries(
    {},
    optional={
        "weights": st.sampled_from(["source", "fresh"]),
        "fold": FOLDS,
        "relax": st.fixed_dictionaries({"rank": RANKS}, optional={"vectors": st.sampled_from(["tied", "own"])})
        | st.fixed_dictionaries({"type": st.just("prefix"), "length": st.integers(1, 3)}),
        "drop": st.dictionaries(st.sampled_from(["block", "attention", "mlp"]), DROPS),
        "exits": st.sampled_from([{"at": [0, 2]}, {"at": "loops"}]),
        "factor": st.fixed_dictionaries(
            {"parameters": st.floats(0.01, 1.5)}, optional={"split": st.sampled_from(["even", "measured"])}
        ),
        "share_kv": st.sampled_from(
            [{"from": "first_loop"}, {"from": "pairs", "heads": [0]}, {"from": {"back": 2}}, [{"depth": 4, "from": 1}]]
        ),
    },
).map(lambda sections: {key: each for key, each in sections.items() if key != "relax" or "fold" in sections})


@settings(max_examples=200, deadline=None)
@given(sections=RECIPES, num_layers=st.integers(6, 9))
def test_any_legal_recipe_builds_a_sound_blueprint_or_is_refused_as_a_recipe(make_arch, sections, num_layers):
    arch = make_arch(num_layers)
    try:
        built = build_blueprint(arch, load_recipe(sections))
    except RecipeError:
        return
    blueprint = built.blueprint
    assert Blueprint.model_validate(blueprint.model_dump()) == blueprint
    assert [depth.source for depth in blueprint.depths] == list(range(num_layers))
    source, target = cost(identity_blueprint(arch), 2), cost(blueprint, 2)
    # Two adapters of rank r on [out, in] hold at most r (out + in) numbers each, r capped at the smaller side.
    lora = sum(
        rank * sum(depth_linears(blueprint, index)[name])
        for index, depth in enumerate(blueprint.depths)
        for name, rank in depth.ranks.items()
    )
    prefixes = sum(depth.prefix for depth in blueprint.depths) * arch.hidden_size
    assert target.parameters - lora - prefixes <= source.parameters
    assert (built.starts.lora is None) == (lora == 0)
    # The keys and values of prefixes are kept beside those of tokens: two matrices for each key-value head.
    prefixed = sum(depth.prefix for depth in blueprint.depths) * 2 * 2 * arch.num_key_value_heads * arch.head_dim
    assert target.cache_bytes(64) <= source.cache_bytes(64) + prefixed
    shapes = {(pool, part, name): shape for pool, part, name, shape in stored_linears(blueprint)}
    factors = {
        (pool, part, name): rank
        for pool in POOLS
        for part, stored in enumerate(blueprint.pool(pool))
        for name, rank in stored.factors.items()
    }
    # Factors are smaller than the matrices whose places they take.
    assert all(0 < rank * sum(shapes[key]) < shapes[key][0] * shapes[key][1] for key, rank in factors.items())
    if factors:
        held = lora + sum(
            factors[key] * sum(shape) if key in factors else shape[0] * shape[1] for key, shape in shapes.items()
        )
        assert held <= linear_budget(identity_blueprint(arch), sections["factor"]["parameters"])
    for pool in ("mixer", "mlp"):
        # Stored in the order in which they first run.
        used = [part for part in (getattr(depth, pool) for depth in blueprint.depths) if part is not None]
        assert list(dict.fromkeys(used)) == list(range(len(blueprint.pool(pool))))
        for part, stored in enumerate(blueprint.pool(pool)):
            tied = {blueprint.depths[user].source for user in blueprint.users(pool, part)}
            fold = sections.get("fold", {})
            if sections.get("weights") == "fresh":
                assert stored.sources == ()
            elif len(stored.sources) > 1 or fold.get("init") == "average":
                assert set(stored.sources) == tied
