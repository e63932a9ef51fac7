"""Ranks by a price per parameter, against random ranks of the same cost."""

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest

from refold.blueprint.schema import Blueprint, part_linears
from refold.errors import RecipeError
from refold.planning.allocation import Choice, Curve, MeasuredLinear, SharedCurve, allocate, keep_energy, with_ranks
from refold.planning.build import build_blueprint, identity_blueprint
from refold.planning.factors import linear_budget, stored_linears, stored_parameters
from refold.recipe.load import load_recipe

FACTORS = Choice(factors=True, loras=False)
LORAS = Choice(factors=False, loras=True)
BOTH = Choice(factors=True, loras=True)
SIZE = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 96}


def curve(size: int, seed: int, scale: float) -> Curve:
    """Returns a convex curve over ranks: the energy of a falling spectrum beyond each rank."""
    drawn = random.Random(seed)
    spectrum = sorted((scale * drawn.random() ** 4 for _ in range(size)), reverse=True)
    return Curve(ranks=tuple(range(size + 1)), lost=tuple(sum(spectrum[rank:]) for rank in range(size + 1)))


def measured(blueprint: Blueprint, joint: bool = False) -> list[MeasuredLinear]:
    found = []
    for seed, (pool, part, name, (rows, columns)) in enumerate(stored_linears(blueprint)):
        users, small, scale = blueprint.users(pool, part), min(rows, columns), 10.0 ** (seed % 4)
        shared = [users] if joint else [(user,) for user in users]
        tied = tuple(
            SharedCurve(curve=curve(small, 100 * seed + depths[0], 0.3 * scale), depths=depths) for depths in shared
        )
        apart = tuple(curve(small, 100 * seed + 50 + user, scale) for user in users)
        found.append(
            MeasuredLinear(
                pool=pool,
                part=part,
                linear=name,
                rows=rows,
                columns=columns,
                depths=users,
                stored=curve(small, 100 * seed + 99, scale),
                together=tied if len(users) > 1 else (),
                apart=apart if len(users) > 1 else (),
            )
        )
    return found


def factors_lost(linears: Sequence[MeasuredLinear], ranks: Mapping[int, int | None]) -> float:
    pairs = [(each.stored, ranks[at]) for at, each in enumerate(linears)]
    return sum(stored.lost[-1] if rank is None else stored.at(rank) for stored, rank in pairs)


def factor_ranks(linears: Sequence[MeasuredLinear], blueprint: Blueprint) -> dict[int, int | None]:
    return {at: blueprint.pool(each.pool)[each.part].factors.get(each.linear) for at, each in enumerate(linears)}


def factors_cost(linears: Sequence[MeasuredLinear], ranks: Mapping[int, int | None]) -> int:
    pairs = [(each, ranks[at]) for at, each in enumerate(linears)]
    return sum(each.whole if rank is None else each.unit * rank for each, rank in pairs)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.67, 0.9])
def test_factors_spend_the_budget_and_no_random_deal_is_better(make_arch, share):
    blueprint = identity_blueprint(make_arch(4, **SIZE))
    linears = measured(blueprint)
    budget = int(share * sum(each.whole for each in linears))
    ranks = factor_ranks(linears, allocate(linears, blueprint, FACTORS, budget))
    spent, lost = factors_cost(linears, ranks), factors_lost(linears, ranks)
    assert 0.995 * budget <= spent <= budget
    drawn = random.Random(1)
    for _ in range(200):
        order, other = list(range(len(linears))), dict.fromkeys(range(len(linears)), 1)
        drawn.shuffle(order)
        left = budget - factors_cost(linears, other)
        for at in order:
            most = min(left // linears[at].unit, min(linears[at].rows, linears[at].columns) - 1)
            more = drawn.randint(0, most)
            other[at] += more
            left -= more * linears[at].unit
        for at in order:
            more = min(left // linears[at].unit, min(linears[at].rows, linears[at].columns) - other[at])
            other[at] += more
            left -= more * linears[at].unit
        assert factors_cost(linears, other) <= budget
        assert factors_lost(linears, other) >= lost
    even = {at: max(1, int(share * each.whole / each.unit)) for at, each in enumerate(linears)}
    assert factors_lost(linears, even) > 1.2 * lost


def test_a_linear_kept_whole_is_no_factor(make_arch):
    arch = make_arch(4, **SIZE)
    built = build_blueprint(arch, load_recipe({"factor": {"parameters": 0.6}})).blueprint
    assert all("q_proj" in part.factors for part in built.mixers)
    linears = measured(identity_blueprint(arch))
    budget = sum(each.whole for each in linears)
    whole = allocate(linears, built, FACTORS, budget)
    assert not any(part.factors for part in (*whole.mixers, *whole.mlps))
    some = allocate(linears, built, FACTORS, int(0.8 * budget))
    kept = [ranks for ranks in factor_ranks(linears, some).values() if ranks is None]
    assert 0 < len(kept) < len(linears)
    assert all(
        rank * sum(part_linears(some, "mixer", index)[name]) < 64 * 64
        for index, part in enumerate(some.mixers)
        for name, rank in part.factors.items()
    )


def test_measured_ranks_take_the_place_of_even_ones(make_arch):
    recipe = load_recipe({"fold": {"loops": 2}, "relax": {"rank": {"parameters": 0.2}}})
    built = build_blueprint(make_arch(4, **SIZE), recipe).blueprint
    linears = measured(built)
    base = sum(each.whole for each in linears)
    room = 8 * sum(each.unit for each in linears)
    found = allocate(linears, built, LORAS, base + room)
    spent = 0
    for each in linears:
        for depth in each.depths:
            spent += each.unit * found.depths[depth].ranks.get(each.linear, 0)
    assert 0.99 * room <= spent <= room
    # Errors of some are a thousand times as large: those get what the others do not, who lose their entry.
    assert any(len(depth.ranks) < 7 for depth in found.depths)
    assert max(rank for depth in found.depths for rank in depth.ranks.values()) > 8
    assert not any(part.factors for part in (*found.mixers, *found.mlps))


@pytest.mark.parametrize("joint", [False, True])
def test_what_does_not_pay_as_tied_is_kept_by_each_depth_alone(make_arch, joint):
    recipe = {
        "fold": {"loops": 2, "init": "average"},
        "relax": {"rank": {"split": "measured"}, "init": "joint"},
        "factor": {"parameters": 0.5, "split": "measured"},
    }
    built = build_blueprint(make_arch(4, **SIZE), load_recipe(recipe)).blueprint
    linears = measured(built, joint)
    # One whose layers have nothing in common and little to say, one whose layers are the same.
    apart = linears[0].model_copy(
        update={
            "together": tuple(
                SharedCurve(curve=curve(64, 7, 1000.0), depths=each.depths) for each in linears[0].together
            ),
            "apart": tuple(curve(64, 8, 1e-4) for _ in linears[0].depths),
        }
    )
    alike = linears[1].model_copy(
        update={"together": tuple(SharedCurve(curve=curve(32, 9, 0.0), depths=s.depths) for s in linears[1].together)}
    )
    linears = [apart, alike, *linears[2:]]
    budget = sum(each.whole for each in linears)
    found = allocate(linears, built, BOTH, budget)
    assert found.mixers[0].factors.get("q_proj") == 0
    assert all(found.depths[depth].ranks["q_proj"] >= 1 for depth in apart.depths)
    assert "k_proj" not in found.mixers[0].factors
    assert not any("k_proj" in found.depths[depth].ranks for depth in alike.depths)
    held = 0
    for each in linears:
        factor = found.pool(each.pool)[each.part].factors.get(each.linear)
        held += each.whole if factor is None else factor * each.unit
        held += sum(each.unit * found.depths[depth].ranks.get(each.linear, 0) for depth in each.depths)
    assert 0.99 * budget <= held <= budget


def test_a_budget_below_the_smallest_ranks_is_refused(make_arch):
    blueprint = identity_blueprint(make_arch(4, **SIZE))
    linears = measured(blueprint)
    least = sum(each.unit for each in linears)
    assert factors_cost(linears, factor_ranks(linears, allocate(linears, blueprint, FACTORS, least))) == least
    with pytest.raises(RecipeError, match=rf"at least {least:,} parameters are required .* \(got {least - 1:,}\)"):
        allocate(linears, blueprint, FACTORS, least - 1)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("energy", [0.3, 0.8, 1.0])
def test_ranks_by_energy_are_the_smallest_that_keep_the_share(make_arch, energy, joint):
    recipe = {"fold": {"loops": 2, "prelude": 2}, "relax": {"rank": {"energy": energy}}}
    built = build_blueprint(make_arch(6, **SIZE), load_recipe(recipe)).blueprint
    linears = measured(built, joint)
    found = keep_energy(linears, built, energy)
    for each in linears:
        for shared in each.together:
            rank = sum(found.depths[depth].ranks.get(each.linear, 0) for depth in shared.depths)
            allowed = (1 - energy) * shared.curve.lost[0]
            assert shared.curve.at(rank) <= allowed + 1e-12
            assert rank == 0 or shared.curve.at(rank - 1) > allowed


def test_a_curve_is_straight_between_its_ranks():
    found = Curve(ranks=(0, 2, 10), lost=(9.0, 5.0, 1.0))
    assert [found.at(rank) for rank in (0, 1, 2, 4, 10, 12)] == [9, 7, 5, 4, 1, 1]
    assert [found.smallest(lost) for lost in (9, 6, 5, 3, 0)] == [0, 2, 2, 6, 10]
    assert [found.best(price) for price in (3.0, 1.0, 0.1)] == [0, 2, 10]
    assert found.best(3.0, least=1) == 2
    assert all(after <= before for before, after in pairwise(found.at(rank) for rank in range(11)))


def test_ranks_of_nothing_are_taken_away_and_others_stay(make_arch):
    recipe = load_recipe({"fold": {"loops": 2}, "relax": {"rank": 3}, "factor": {"parameters": 0.4}})
    built = build_blueprint(make_arch(4, **SIZE), recipe).blueprint
    found = with_ranks(built, {0: {"q_proj": 0, "k_proj": 5}}, {("mixer", 0): {"q_proj": None, "v_proj": 2}})
    assert "q_proj" not in found.depths[0].ranks
    assert (found.depths[0].ranks["k_proj"], found.depths[0].ranks["v_proj"]) == (5, 3)
    assert "q_proj" not in found.mixers[0].factors
    assert found.mixers[0].factors["v_proj"] == 2
    assert found.mixers[1] == built.mixers[1]


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_bases_cost_coefficients_of_every_depth_and_no_random_deal_is_better(make_arch, share):
    recipe = {"fold": {"loops": 3, "prelude": 1, "coda": 2}, "factor": {"parameters": share, "share": "basis"}}
    blueprint = build_blueprint(make_arch(6, **SIZE), load_recipe(recipe)).blueprint
    linears = [
        each.model_copy(update={"is_basis": len(each.depths) > 1, "together": (), "apart": ()})
        for each in measured(blueprint)
    ]
    budget = linear_budget(identity_blueprint(blueprint.arch), share)
    found = allocate(linears, blueprint, FACTORS, budget)
    assert sum(stored_parameters(found, each) for each in stored_linears(found)) <= budget
    ranks = []
    for each in linears:
        held = found.pool(each.pool)[each.part]
        assert (each.linear in held.bases) == (len(each.depths) == 3)
        assert each.unit == each.columns + len(each.depths) * each.rows
        ranks.append(held.bases.get(each.linear, held.factors.get(each.linear)))
    shared = [at for at, each in enumerate(linears) if each.is_basis]
    lost = sum(linears[at].stored.at(ranks[at]) for at in shared)
    spent = sum(linears[at].unit * ranks[at] for at in shared)
    assert len({ranks[at] for at in shared}) > 2
    drawn = random.Random(1)
    for _ in range(200):
        other, left = dict.fromkeys(shared, 1), spent - sum(linears[at].unit for at in shared)
        for at in drawn.sample(shared, len(shared)):
            more = drawn.randint(0, min(left // linears[at].unit, min(linears[at].rows, linears[at].columns) - 1))
            other[at] += more
            left -= more * linears[at].unit
        # The curves are convex up to the grain of one rank.
        assert sum(linears[at].stored.at(rank) for at, rank in other.items()) > 0.999 * lost


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(("rest", "expected"), [(0, (1, 1)), (5, (6, 1)), (8, (9, 1)), (12, (9, 5))])
def test_the_rest_of_a_budget_goes_first_where_it_saves_most(make_arch, order, rest, expected):
    blueprint = identity_blueprint(make_arch(4, **SIZE))
    # Each curve has one step of eight ranks, which saves 80 on the first linear and 40 on the second.
    curves = [Curve(ranks=(0, 1, 9), lost=(lost, 100.0, last)) for lost, last in ((2000.0, 20.0), (2000.0, 60.0))]
    linears = [
        MeasuredLinear(
            pool="mixer", part=part, linear="q_proj", rows=64, columns=64, depths=(part,), stored=curves[part]
        )
        for part in order
    ]
    budget = (2 + rest) * linears[0].unit + linears[0].unit // 2
    found = allocate(linears, blueprint, FACTORS, budget)
    assert tuple(found.mixers[part].factors["q_proj"] for part in (0, 1)) == expected


@pytest.mark.parametrize(("floor", "multiple"), [(0.5, 1), (1.0, 1), (0.6, 8)])
def test_no_rank_is_below_its_floor(make_arch, floor, multiple):
    recipe = {"factor": {"parameters": 0.4, "split": "measured", "weight": "none"}}
    even = build_blueprint(make_arch(4, **SIZE), load_recipe(recipe)).blueprint
    linears = measured(even)
    budget = linear_budget(identity_blueprint(even.arch), 0.4)
    free = factor_ranks(linears, allocate(linears, even, FACTORS, budget))
    choice = Choice(factors=True, loras=False, floor=floor, multiple=multiple)
    found = factor_ranks(linears, allocate(linears, even, choice, budget))
    assert factors_cost(linears, found) <= budget
    below = 0
    for at, rank in found.items():
        rank_even = even.pool(linears[at].pool)[linears[at].part].factors[linears[at].linear]
        least = floor * rank_even
        below += (free[at] or rank_even) < least
        if rank is not None:
            # A recipe rounds ranks above a multiple down to one afterwards.
            lowered, most = (each if each < multiple else each // multiple * multiple for each in (rank, rank_even))
            assert lowered >= min(least, most)
    # Without the floor some linears are starved.
    assert below
