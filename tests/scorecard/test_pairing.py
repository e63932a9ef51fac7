import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from refold.scorecard.pairing import Difference, Figure, Units, average, pair, subtract


def units(amounts, sizes=None, names=None) -> Units:
    amounts = np.asarray(amounts, dtype=np.float64)
    sizes = np.ones(len(amounts)) if sizes is None else np.asarray(sizes, dtype=np.float64)
    return Units(tuple(map(str, range(len(amounts)))) if names is None else tuple(names), amounts, sizes)


def figure(found: Units) -> Figure:
    return Figure(found.ratio(), found.error(), len(found.counted().names), found)


def documents(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes, and bits of a model on them: documents differ much more from each other than two models on one."""
    sizes = np.round(np.exp(generator.normal(6, 0.5, count)))
    return sizes, sizes * generator.normal(1.2, 0.2, count)


def test_equal_names_are_paired_in_order():
    assert pair("abcab", "bbxa") == [(0, 3), (1, 0), (4, 1)]
    assert pair("ab", "cd") == []


def test_with_equal_sizes_the_paired_test_is_scipys():
    generator = np.random.default_rng(0)
    one = generator.normal(0.5, 1, 40)
    other = one + generator.normal(0.1, 0.3, 40)
    found = subtract(figure(units(one)), figure(units(other)))
    expected = stats.ttest_rel(one, other)
    assert (found.num_pairs, found.df) == (40, 39)
    assert found.value == pytest.approx((one - other).mean(), rel=1e-12)
    assert found.error == pytest.approx(stats.sem(one - other), rel=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)


def test_without_common_names_the_test_is_welchs():
    generator = np.random.default_rng(1)
    one, other = generator.normal(0, 1, 12), generator.normal(0.5, 2, 40)
    found = subtract(figure(units(one)), figure(units(other, names=[f"x{n}" for n in range(40)])))
    expected: Any = stats.ttest_ind(one, other, equal_var=False)
    assert found.num_pairs == 0
    assert found.df == pytest.approx(expected.df, rel=1e-9)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)


def test_answers_are_compared_by_the_exact_sign_test():
    one, other = np.repeat([1, 1, 0, 0], [50, 3, 11, 36]), np.repeat([1, 0, 1, 0], [50, 3, 11, 36])
    found = subtract(figure(units(one)), figure(units(other)))
    assert found.p == pytest.approx(stats.binomtest(3, 14).pvalue)
    assert found.error == pytest.approx(stats.sem((one - other).astype(np.float64)))
    # Answers that are right in part are no answers: Student's t.
    halves = subtract(figure(units(one / 2)), figure(units(other / 2)))
    assert halves.p == pytest.approx(stats.ttest_rel(one / 2, other / 2).pvalue)


@pytest.mark.parametrize("other_sizes", [False, True])
def test_the_error_of_a_ratio_is_near_a_bootstrap(other_sizes: bool):
    """With other sizes, as of two tokenizers without a start token, sizes of a document differ a little."""
    generator = np.random.default_rng(2)
    sizes, bits = documents(generator, 80)
    more = bits * generator.normal(1.01, 0.02, 80)
    theirs = sizes + generator.integers(0, 9, 80) if other_sizes else sizes
    found = subtract(figure(units(more, sizes)), figure(units(bits, theirs)))
    draws = generator.integers(0, 80, (4000, 80))
    replicas = more[draws].sum(1) / sizes[draws].sum(1) - bits[draws].sum(1) / theirs[draws].sum(1)
    assert found.value == pytest.approx(more.sum() / sizes.sum() - bits.sum() / theirs.sum(), rel=1e-12)
    assert found.error == pytest.approx(replicas.std(), rel=0.1)
    # Unpaired, the same difference drowns in the spread of documents.
    apart = subtract(figure(units(more, sizes)), Figure(*_without_units(figure(units(bits, theirs)))))
    assert apart.error is not None
    assert found.error is not None
    assert apart.error > 5 * found.error


def _without_units(given: Figure) -> tuple[float, float | None, int]:
    return given.value, given.error, given.count


@pytest.mark.parametrize("is_paired", [True, False])
def test_models_that_do_not_differ_are_called_different_in_one_of_twenty_cases(is_paired: bool):
    generator = np.random.default_rng(3)
    rounds, calls, unfair = 1000, 0, 0
    for _ in range(rounds):
        sizes, bits = documents(generator, 30)
        if is_paired:
            others, theirs, names = bits + sizes * generator.normal(0, 0.02, 30), sizes, None
            bits = bits + sizes * generator.normal(0, 0.02, 30)
        else:
            (theirs, others), names = documents(generator, 20), [f"x{n}" for n in range(20)]
        found = subtract(figure(units(bits, sizes)), figure(units(others, theirs, names)))
        assert found.p is not None
        assert found.error is not None
        calls += found.p < 0.05
        # A control: an error that is a third too small is noticed.
        unfair += abs(found.value) > 1.3 * found.error
    assert 0.035 < calls / rounds < 0.065
    assert unfair / rounds > 0.15


def test_equally_good_models_on_answers_are_seldom_called_different():
    generator = np.random.default_rng(4)
    rounds, calls = 1000, 0
    for _ in range(rounds):
        hard = generator.random(100)
        one, other = ((generator.random(100) > hard).astype(np.float64) for _ in range(2))
        p = subtract(figure(units(one)), figure(units(other))).p
        assert p is not None
        calls += p < 0.05
    # The exact test is on the safe side.
    assert 0.005 < calls / rounds < 0.055


def test_a_real_difference_is_found_paired_and_lost_with_labels_swapped_at_random():
    generator = np.random.default_rng(5)
    sizes, bits = documents(generator, 100)
    worse = bits + sizes * generator.normal(0.01, 0.02, 100)
    found = subtract(figure(units(worse, sizes)), figure(units(bits, sizes)))
    assert found.p is not None
    assert found.p < 1e-3
    swapped = generator.random(100) < 0.5
    one, other = np.where(swapped, bits, worse), np.where(swapped, worse, bits)
    p = subtract(figure(units(one, sizes)), figure(units(other, sizes))).p
    assert p is not None
    assert p > 0.05


def test_a_difference_the_other_way_round_has_the_other_sign_and_the_same_p():
    generator = np.random.default_rng(6)
    sizes, bits = documents(generator, 25)
    one, other = figure(units(bits, sizes)), figure(units(bits * generator.normal(1, 0.1, 25), sizes))
    there, back = subtract(one, other), subtract(other, one)
    assert there.value == -back.value
    assert (there.error, there.p) == (pytest.approx(back.error), pytest.approx(back.p))


def test_units_without_a_partner_are_left_out_unless_they_are_most():
    amounts = np.arange(10.0)
    base = figure(units(amounts + np.array([1.0, 3.0] * 5)))
    most = figure(units(np.append(amounts[:6], 99.0), names=[*map(str, range(6)), "new"]))
    found = subtract(most, base)
    assert (found.num_pairs, found.value) == (6, pytest.approx(-2.0))
    few = figure(units(amounts[:6], names=["0", "1", "x", "y", "z", "w"]))
    assert subtract(few, base).num_pairs == 0


def test_units_of_no_size_do_not_count():
    one, base = units([1.0, 2.0, 5.0], [1, 1, 0]), units([1.5, 2.0, 7.0], [1, 1, 0])
    assert subtract(figure(one), figure(base)).num_pairs == 2


def test_what_does_not_differ_at_all_has_a_p_of_one_and_what_cannot_be_tested_has_none():
    same = figure(units([0.5, 0.25, 1.0]))
    assert subtract(same, same).p == 1.0
    assert subtract(Figure(1.0), Figure(2.0)) == Difference(-1.0)
    # All right here, all wrong there, on other items: no spread that a test could go by.
    right, wrong = Figure(1.0, 0.0, 3), Figure(0.0, 0.0, 3)
    assert subtract(right, wrong).p is None


def test_an_average_is_that_of_independent_differences():
    parts = [Difference(0.1, 0.03, 100, 99.0, 0.1), Difference(-0.02, 0.04, 50, 49.0, 0.1)]
    found = average(parts)
    assert (found.value, found.error, found.num_pairs) == (pytest.approx(0.04), pytest.approx(0.025), 50)
    df = 0.025**4 / (0.015**4 / 99 + 0.02**4 / 49)
    assert found.df == pytest.approx(df)
    assert found.p == pytest.approx(2 * stats.t.sf(0.04 / 0.025, df))
    assert average([parts[0], Difference(0.3)]).error is None


def test_what_is_no_number_is_not_tested_and_spoils_no_average():
    broken = subtract(Figure(math.nan, 0.1, 9), Figure(1.0, 0.1, 9))
    assert math.isnan(broken.value)
    assert broken.p is None
    assert broken.error is None
    assert subtract(Figure(2.0, math.inf, 9), Figure(1.0, 0.1, 9)).p is None
