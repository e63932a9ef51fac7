"""Exits by request: each row leaves by the thresholds of its own tolerance, in shared launches."""

from dataclasses import replace
from typing import cast

import pytest

from refold.engine.confidence import Measure
from refold.engine.engine import Engine
from refold.engine.exits import ExitLevels, ExitRule
from refold.engine.settings import Drafts, EngineSettings
from refold.engine.thresholds import ExitThreshold, Thresholds, ToleranceLevel, model_fingerprint
from refold.errors import RefoldError
from refold.generation.sampling import Sampling
from refold.serve.host import EngineHost
from tests.engine.conftest import make_prompts, options

LAX = {0.01: None, 0.05: 0.02, 0.2: 0.0}
"""Tolerance to the threshold of the only exit."""


def calibrated(model, limits=LAX, default=0.05, measure="top1") -> Thresholds:
    def level(tolerance, limit):
        exits = (ExitThreshold(depths=2, threshold=limit, leaves=0.5, differs=0.0, bound=0.0),)
        return ToleranceLevel(tolerance=tolerance, exits=exits, live=None)

    return Thresholds(
        measure=cast("Measure", measure),
        kv="recompute",
        tolerance=default,
        confidence=0.9,
        levels=tuple(level(*each) for each in limits.items()),
        documents=100,
        tokens=1000,
        context=32,
        corpus="f" * 64,
        model=model_fingerprint(model),
    )


def make(model, **given) -> Engine:
    given = {"exits": calibrated(model), "max_pending": 99, **given}
    return Engine(model, EngineSettings(**options(**given)))


def short(count=10, **given) -> Sampling:
    return Sampling(max_new_tokens=count, ignore_eos=True, **given)


@pytest.mark.parametrize("measure", ["top1", "gate"])
def test_rows_of_one_launch_leave_by_their_own_tolerances(load, measure):
    model, prompts = load("exits"), make_prompts((7, 9, 12, 5))
    limits = {0.01: None, 0.05: 0.02 if measure == "top1" else 0.55, 0.2: 0.0}
    exits = calibrated(model, limits, measure=measure)
    asked = [None, 0.0, 0.01, 0.2]
    alone = [make(model, exits=exits).generate([each], short(exit_tolerance=at))[0].choices[0] for each, at in
             zip(prompts, asked, strict=True)]  # fmt: skip
    engine = make(model, exits=exits)
    beside = [each.choices[0] for each in engine.generate(prompts, [short(exit_tolerance=at) for at in asked])]
    assert beside == alone
    assert [set(each.depths) for each in beside[1:]] == [{4}, {4}, {2}]
    assert set(beside[0].depths) <= {2, 4}
    assert 2 in beside[0].depths
    assert engine.statistics().counts.mixed_launches


def test_a_request_takes_the_largest_tolerance_that_is_not_above_its_own(load):
    model, (prompt,) = load("exits"), make_prompts((7,))
    engine = make(model)
    assert (engine.tolerances, engine.tolerance) == ((0.01, 0.05, 0.2), 0.05)

    def depths(asked):
        return engine.generate([prompt], short(exit_tolerance=asked))[0].choices[0].depths

    assert depths(0.004) == depths(0.0) == depths(0.01) == (4,) * 10
    assert depths(0.19) == depths(0.05) == depths(None) != depths(0.01)
    assert depths(0.9) == depths(0.2) == (2,) * 10
    host = EngineHost(engine, lambda messages: None).facts()
    assert (host.tolerances, host.tolerance, host.exit_depths) == ((0.01, 0.05, 0.2), 0.05, (2,))


def test_the_engine_may_choose_another_default_or_none(load):
    model, (prompt,) = load("exits"), make_prompts((7,))
    for chosen, own, depth, told in ((0.3, 0.2, 2, "exits at tolerance 0.2"), (0.0, None, 4, "exits off unless asked")):
        engine = make(model, exit_tolerance=chosen)
        assert engine.tolerance == own
        assert told in engine.describe()
        assert engine.tolerances == (0.01, 0.05, 0.2)
        assert set(engine.generate([prompt], short())[0].choices[0].depths) == {depth}
        assert set(engine.generate([prompt], short(exit_tolerance=0.2))[0].choices[0].depths) == {2}
        assert set(engine.generate([prompt], short(exit_depth=2))[0].choices[0].depths) == {2}
    with pytest.raises(RefoldError, match=r"exit_tolerance: must be 0 or at least 0\.01, .*--tolerance 0\.001"):
        make(model, exit_tolerance=0.001)
    with pytest.raises(RefoldError, match="exit_tolerance: exits are required beside it"):
        make(model, exits=None, exit_tolerance=0.1)
    with pytest.raises(RefoldError, match="exit_tolerance: must be at least 0 and below 1"):
        make(model, exit_tolerance=1.0)


def test_a_tolerance_needs_exits_that_have_one(load):
    model, (prompt,) = load("exits"), make_prompts((7,))
    for given, why in (
        ({"exits": None}, "for one that runs the full depth"),
        ({"exits": None, "drafts": Drafts(tokens=3, adapt=False)}, "for drafts, which take the full depth"),
        ({"exits": ExitRule("top1", {2: 0.0})}, "for exits by a rule without a tolerance"),
    ):
        engine = make(model, **given)
        with pytest.raises(RefoldError, match=f"exit_tolerance: .*{why}"):
            engine.generate([prompt], short(exit_tolerance=0.1))
        assert set(engine.generate([prompt], short(exit_tolerance=0.0))[0].choices[0].depths) == {4}
    assert make(model, exits=ExitRule("top1", {2: 0.0})).tolerance is None
    assert ExitLevels("top1", None).find(0.0) is None


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"exit_tolerance": -0.1}, "exit_tolerance: must be at least 0 and below 1"),
        ({"exit_tolerance": float("nan")}, "exit_tolerance: must be at least 0 and below 1"),
        ({"exit_tolerance": "0.1"}, "exit_tolerance: a number is required"),
        ({"exit_tolerance": 0.1, "exit_depth": 2}, "exit_tolerance: no exit_depth is required beside it"),
    ],
)
def test_tolerances_out_of_range_are_refused(given, match):
    with pytest.raises(RefoldError, match=match):
        Sampling(**given)
    assert replace(Sampling(), exit_tolerance=0.0).exit_tolerance == 0.0


def test_exits_that_nobody_asks_for_cost_no_launches(load):
    """Rows run the whole stack at once until a row that may leave runs beside them, and again after it."""
    model, prompts = load("exits"), make_prompts((7, 9))
    plain = make(model, exits=None, join_loops=None)
    expected = plain.generate(prompts, short())
    engine = make(model, exit_tolerance=0.0, join_loops=None)
    found = engine.generate(prompts, short())
    assert [each.choices for each in found] == [each.choices for each in expected]
    few = plain.statistics().counts.launches
    assert engine.statistics().counts.launches == few
    mixed = engine.generate([*prompts, prompts[0]], [short(), short(30), short(4, exit_tolerance=0.2)])
    assert mixed[0].choices == expected[0].choices
    assert set(mixed[2].choices[0].depths) == {2}
    assert engine.statistics().counts.mixed_launches
    before = engine.statistics().counts.launches
    assert engine.generate(prompts, short())[1].choices == expected[1].choices
    assert engine.statistics().counts.launches - before == few


def test_slots_and_depths_are_counted_while_rows_leave(load):
    engine = make(load("exits"), exits=ExitRule("top1", {}, lambda index, place: 4 if place % 3 == 2 else 2))
    requests = [engine.prepare(prompt, short(8)) for prompt in make_prompts((3, 9, 14, 6))]
    for request in requests:
        engine.submit(request)
    seen = set()
    while engine.has_work:
        engine.step()
        report = engine.statistics()
        assert sum(report.slots.values()) == report.running
        seen |= set(report.slots)
    assert seen == {0, 2}
    told = [depth for request in requests for depth in engine.take(request).choices[0].depths]
    assert engine.statistics().counts.depths == {depth: told.count(depth) for depth in (2, 4)}


@pytest.mark.parametrize("exits", [True, False])
def test_a_cancel_frees_row_and_pages_within_one_step(load, exits):
    engine = make(load("exits"), max_rows=2, **({} if exits else {"exits": None}), share_prefixes=False)
    first, second, third = (engine.prepare(prompt, short(40)) for prompt in make_prompts((9, 6, 5)))
    for request in (first, second, third):
        engine.submit(request)
    for _ in range(5):
        engine.step()
    held = engine.statistics().used_pages
    assert engine.statistics().waiting == 1
    engine.cancel(first)
    report = engine.statistics()
    assert (report.running, report.used_pages < held) == (1, True)
    assert engine.step() == [first]
    assert (engine.statistics().running, engine.statistics().waiting) == (2, 0)
    for request in (second, third):
        engine.cancel(request)
    assert set(map(id, engine.step())) == {id(second), id(third)}
    report = engine.statistics()
    assert (report.running, report.waiting, report.used_pages, report.slots) == (0, 0, 0, {})
    engine._pools.check()
