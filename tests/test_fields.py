import pytest

from refold.fields import read_amount


@pytest.mark.parametrize(
    ("written", "amount"),
    [
        ("20M", 20_000_000),
        ("20m", 20_000_000),
        ("1.5k", 1_500),
        ("2_000", 2_000),
        ("1e6", 1_000_000),
        ("0.3B", 300_000_000),
        ("1 G", 10**9),
        ("2T", 2 * 10**12),
        (2e6, 2_000_000),
        (7, 7),
    ],
)
def test_amounts_are_read_as_written(written, amount):
    assert read_amount(written) == amount


@pytest.mark.parametrize("written", ["M", "-3", "20MB", "", "1..5k", "inf"])
def test_what_is_no_amount_is_refused(written):
    with pytest.raises(ValueError, match="must be a whole number such as 20000000, 20M"):
        read_amount(written)


def test_a_broken_amount_is_refused():
    with pytest.raises(ValueError, match=r"must be a whole number \(got '1.2345k', which is 1234.5"):
        read_amount("1.2345k")
