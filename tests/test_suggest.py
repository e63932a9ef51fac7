import pytest

from refold.suggest import did_you_mean, must_be_one_of, shorten


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ("pruned2", "must be one of pruned, scratch (got 'pruned2'); did you mean 'pruned'?"),
        ("best", "must be one of pruned, scratch (got 'best')"),
        (None, "must be one of pruned, scratch (got None)"),
        (3, "must be one of pruned, scratch (got 3)"),
    ],
)
def test_a_wrong_name_is_told_the_legal_ones_and_the_closest(got, expected):
    assert must_be_one_of(got, iter(("pruned", "scratch"))) == expected


def test_values_are_shortened():
    assert shorten("x" * 10_000) == "'" + "x" * 47 + "..." + "x" * 48 + "'"
    assert shorten(10**5000) == "a number of 16610 bits"
    assert shorten([[[[[1]]]]]) == "[[[[...]]]]"
    assert len(shorten({f"key {n}" * 9: "y" * 90 for n in range(99)})) <= 200
    assert shorten("abc", 100) == "'abc'"


def test_nothing_is_suggested_where_nothing_is_close():
    assert did_you_mean("fold.loop", ["loops", "fold.loops"]) == "; did you mean 'fold.loops'?"
    assert did_you_mean("xyz", ["loops"]) == ""
