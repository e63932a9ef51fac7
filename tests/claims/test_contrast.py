"""Outcomes of contrasts on made readings: the stated order, swapped arms, equal arms, and other seeds."""

import math
from typing import Any

import numpy as np
import pytest

from refold.claims.claim import ClaimArm, Reading
from refold.claims.contrast import Contrast, as_good, better, decide
from refold.claims.evidence import Evidence, Samples
from refold.claims.record import FindingRecord
from refold.claims.study import decide_claim
from refold.claims.token_ratio import TokenRatio, token_ratio, tokens_to_reach

GOOD, BAD, MIDDLE = (ClaimArm(name, {}) for name in ("good", "bad", "middle"))


class MadeBench:
    """Readings with a known loss for each arm, noise of documents that all arms share, and noise of seeds."""

    domains = ("books", "docs")

    def __init__(self, losses: dict[str, float], seed: int = 0, curves: dict[str, Any] | None = None):
        self._losses, self._seed, self._curves = losses, seed, curves or {}

    def samples(self, reading: Reading, domain: str) -> Samples:
        shared = np.random.default_rng([7, self.domains.index(domain)])
        sizes = shared.integers(500, 900, 60)
        hard = shared.normal(0, 0.3, 60)
        own = np.random.default_rng([self._seed, *reading.name.encode()])
        noise = own.normal(0, 0.004, (3, 1)) + own.normal(0, 0.01, (3, 60))
        return Samples((self._losses[reading.name] + hard + noise) * sizes, sizes)

    def curves(self, arm: ClaimArm) -> Any:
        return self._curves[arm.name]


def made(losses: dict[str, float], seed: int = 0, curves: dict[str, Any] | None = None) -> Any:
    """A made bench in the place of a workbench."""
    return MadeBench(losses, seed, curves)


LOSSES = {"good": 1.40, "bad": 1.50, "middle": 1.45}


def verdict(*contrasts: Any, losses: dict[str, float] = LOSSES, seed: int = 0) -> str:
    return decide_claim([found for each in contrasts for found in each.find(made(losses, seed))])


def test_the_stated_order_is_reproduced_and_swapped_arms_are_not() -> None:
    assert verdict(better(GOOD, BAD), better(MIDDLE, BAD)) == "reproduced"
    assert verdict(better(BAD, GOOD), better(MIDDLE, BAD)) == "not reproduced"
    assert verdict(as_good(BAD, GOOD, 0.01)) == "not reproduced"
    assert verdict(as_good(BAD, GOOD, 0.2)) == "reproduced"


def test_equal_arms_are_undecided() -> None:
    same = ClaimArm("good", {})
    assert verdict(better(GOOD, same)) == "undecided at this scale"
    assert verdict(as_good(GOOD, same, 0.01)) == "undecided at this scale"
    alike = {"good": 1.4, "bad": 1.4}
    assert verdict(better(GOOD, BAD), losses=alike) == "undecided at this scale"
    assert verdict(better(BAD, GOOD), losses=alike) == "undecided at this scale"


@pytest.mark.parametrize("seed", range(5))
def test_another_seed_moves_no_verdict_that_is_significant(seed: int) -> None:
    assert verdict(better(GOOD, BAD), seed=seed) == "reproduced"
    assert verdict(better(BAD, GOOD), seed=seed) == "not reproduced"


def test_a_contrast_of_several_readings_is_their_sum() -> None:
    terms = ((0.5, Reading(GOOD)), (0.5, Reading(BAD)), (-1.0, Reading(MIDDLE)))
    found = Contrast("closes half of the gap", terms).find(made({**LOSSES, "middle": 1.42}))[0]
    assert found.effect == pytest.approx(0.03, abs=0.01)
    assert found.outcome == "holds"
    assert [reading.name for reading in found.readings] == ["good", "bad", "middle"]
    assert len(found.readings[0].by_seed) == 3


def test_an_interval_below_the_smallest_effect_speaks_against_a_claim() -> None:
    sure = Evidence(0.001, 0.0002, 100.0, 3, 60)
    assert decide(sure, least=0.0) == "holds"
    assert decide(Evidence(0.0002, 0.0002, 100.0, 3, 60), least=0.0) == "open"
    assert decide(Evidence(0.0002, 0.0002, 100.0, 3, 60), least=0.01) == "fails"
    assert decide(Evidence(0.5, 0.0, 1.0, 1, 0), least=0.0) == "open"


def test_every_text_counts_in_the_verdict() -> None:
    found = better(GOOD, BAD).find(made(LOSSES))
    assert [each.domain for each in found] == ["books", "docs"]
    opened = found[1].model_copy(update={"outcome": "open"})
    failed = found[1].model_copy(update={"outcome": "fails"})
    assert decide_claim([found[0], opened]) == "undecided at this scale"
    assert decide_claim([found[0], opened, failed]) == "not reproduced"


def test_the_token_ratio_is_that_of_the_curves() -> None:
    slow = [(100, 3.0), (200, 2.5), (300, 2.25), (400, 2.0)]
    fast = [(100, 2.5), (200, 1.5), (300, 1.2), (400, 1.1)]
    assert tokens_to_reach(2.0, fast) == pytest.approx(150)
    assert token_ratio(fast, slow) == pytest.approx(400 / 150)
    assert token_ratio(slow, fast) == pytest.approx(150 / 400)
    assert token_ratio(slow, slow) == pytest.approx(1.0)


def test_fewer_tokens_are_found_in_every_seed() -> None:
    slow = [[(100, 3.0 + drift), (200, 2.5), (300, 2.25), (400, 2.0 + drift)] for drift in (0, 0.02, 0.04)]
    fast = [[(100, 2.5 + drift), (200, 1.5), (300, 1.2), (400, 1.1)] for drift in (0, 0.04, 0.01)]
    bench = made({}, curves={"good": fast, "bad": slow})

    def find(first: ClaimArm, second: ClaimArm) -> FindingRecord:
        return TokenRatio(first, second).find(bench)[0]

    assert find(GOOD, BAD).outcome == "holds"
    assert 2 ** find(GOOD, BAD).effect == pytest.approx(400 / 150, rel=0.05)
    assert find(BAD, GOOD).outcome == "fails"
    at_once = made({}, curves={"good": [[(100, 1.0), (400, 0.9)]] * 3, "bad": slow})
    found = TokenRatio(GOOD, BAD).find(at_once)[0]
    assert found.outcome == "holds"
    assert found.note == "at least 4.0 times fewer tokens"
    assert math.isclose(found.effect, 2.0)
