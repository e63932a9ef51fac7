import pytest

from refold.suggest import did_you_mean, must_be_one_of


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


def test_nothing_is_suggested_where_nothing_is_close():
    assert did_you_mean("fold.loop", ["loops", "fold.loops"]) == "; did you mean 'fold.loops'?"
    assert did_you_mean("xyz", ["loops"]) == ""
