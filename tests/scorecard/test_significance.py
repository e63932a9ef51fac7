import math
import random

import pytest
from scipy import special, stats

from refold.scorecard.significance import exact_sign_test, holm, incomplete_beta, two_sided


def test_the_incomplete_beta_function_is_scipys():
    draw = random.Random(0)
    for _ in range(500):
        a, b, x = 10 ** draw.uniform(-1, 4), 10 ** draw.uniform(-1, 4), draw.random()
        assert incomplete_beta(a, b, x) == pytest.approx(special.betainc(a, b, x), abs=1e-11)


@pytest.mark.parametrize(("t", "df"), [(0.0, 5.0), (2.1, 3.0), (-4.0, 1.0), (1.96, 1e6), (5.0, 30.5), (-2.0, math.inf)])
def test_students_t_is_scipys(t: float, df: float):
    assert two_sided(t, df) == pytest.approx(2 * stats.t.sf(abs(t), df), rel=1e-9)


def test_an_infinite_t_is_certain():
    assert two_sided(math.inf, 4.0) == two_sided(-math.inf, math.inf) == 0


@pytest.mark.parametrize(("gains", "losses"), [(0, 0), (0, 1), (6, 0), (3, 9), (4, 5), (500, 420), (9000, 9300)])
def test_the_sign_test_is_scipys_binomial_test(gains: int, losses: int):
    expected = stats.binomtest(gains, gains + losses).pvalue if gains + losses else 1.0
    assert exact_sign_test(gains, losses) == pytest.approx(expected, rel=1e-9)
    assert exact_sign_test(losses, gains) == exact_sign_test(gains, losses)


def test_holms_correction_of_a_worked_example():
    # Three tests: 3 * 0.01, then 2 * 0.03, then at least the one before.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holms_correction_keeps_the_rate_of_any_false_call():
    draw = random.Random(1)
    rounds, rows = 4000, 6
    tables = [[draw.random() for _ in range(rows)] for _ in range(rounds)]
    corrected = sum(min(holm(table)) < 0.05 for table in tables) / rounds
    assert 0.04 < corrected < 0.06
    # Without the correction, a table of six rows has a false call in a quarter of cases.
    assert sum(min(table) < 0.05 for table in tables) / rounds > 0.2
