"""Options of a fit: correct ones are kept, and each that contradicts or lacks another is refused by name."""

from typing import Any

import pytest

from refold.errors import RefoldError
from refold.fitting import options
from refold.fitting.kinds import registry
from refold.fitting.options import FitOptions, SweepRange, check_request, choice_names, read_sweep_range

GOOD: dict[str, Any] = {"source": "model", "out": "out", "bytes_": "35%", "data": ["books.txt"]}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"cache": "25%", "context": 4096, "tokens": 1000},
        {"latency": "20ms", "on": "laptop.json"},
        {"bytes_": None, "max_loss": 0.05},
        {"max_loss": 0.05, "smallest": "flops"},
        {"bytes_": None, "sweep": "25%..80%"},
        {"sweep": "cache=10%..50%:3"},
        {"bytes_": None, "sweep": "latency=10%..50%", "on": "laptop.json"},
        {"bytes_": None, "max_loss": 0.05, "smallest": "latency", "on": "laptop.json"},
    ],
)
def test_options_that_fit_together_pass(more: dict[str, Any]) -> None:
    check_request({name: value for name, value in {**GOOD, **more}.items() if value is not None})


def test_a_device_is_measured_alone() -> None:
    check_request({"measure_device": "laptop.json", "source": "model", "device": "cpu", "overwrite": True})
    with pytest.raises(RefoldError, match=r"only measures this machine \(got --bytes too"):
        check_request({"measure_device": "laptop.json", "bytes_": "35%"})
    with pytest.raises(RefoldError, match="got OUT too"):
        check_request({"measure_device": "laptop.json", "source": "model", "out": "out"})


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"source": None}, r"a source \(SOURCE\) is required"),
        ({"out": None}, r"a folder to write \(OUT\) is required"),
        ({"data": None}, r"text to measure on is required \(got no --data\)"),
        ({"bytes_": None}, r"a budget is required \(got none\)"),
        ({"bytes_": None, "tokens": 5}, r"a budget is required \(got none\)"),
        ({"max_loss": 0.1}, r"asks for the fewest bytes \(got --bytes too\)"),
        ({"bytes_": None, "cache": "9%", "max_loss": 0.1, "smallest": "cache"}, r"fewest cache \(got --cache too\)"),
        ({"smallest": "bytes"}, r"goes with a loss \(got no --max-loss\)"),
        ({"sweep": "25%..80%"}, r"through budgets of bytes \(got --bytes too\)"),
        ({"bytes_": None, "sweep": "25%..80%", "max_loss": 0.1}, r"\(got --max-loss too\)"),
        ({"bytes_": None, "sweep": "25%..80%", "tokens": 10}, r"measured unhealed \(got --sweep and --tokens\)"),
        ({"on": "laptop.json"}, r"--on is the table for a limit of time \(got no --latency\)"),
        ({"latency": "20ms"}, r"\(got no --on\); make one with `refold fit --measure-device"),
        ({"bytes_": None, "sweep": "latency=10%..50%"}, r"\(got no --on\)"),
    ],
)
def test_options_that_contradict_or_lack_each_other_are_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(RefoldError, match=says):
        check_request({name: value for name, value in {**GOOD, **more}.items() if value is not None})


def test_a_sweep_has_budgets_at_equal_distances() -> None:
    assert read_sweep_range("25%..80%") == SweepRange("bytes", 25, 80, options.DEFAULT_POINTS)
    assert read_sweep_range("cache = 10%..50%:5").budgets() == ("10%", "20%", "30%", "40%", "50%")
    assert read_sweep_range("12.5%..20%:4").budgets() == ("12.5%", "15%", "17.5%", "20%")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("25..80", "sweep must be .*such as 25%..80%"),
        ("25%-80%", "sweep must be"),
        ("1.2.3%..80%", "sweep must be"),
        ("25%..80%:", "sweep must be"),
        ("byte=25%..80%", "did you mean 'bytes'"),
        ("80%..25%", "must go up"),
        ("0%..25%", "must go up"),
        ("25%..100%", "below 100%"),
        ("25%..80%:1", "2..50 budgets"),
        ("25%..80%:51", "2..50 budgets"),
    ],
)
def test_other_ranges_are_refused(text: str, says: str) -> None:
    with pytest.raises(RefoldError, match=says):
        read_sweep_range(text)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"tokens": -1}, r"fit: tokens must be at least 0 \(got -1\)"),
        ({"calibration_tokens": 1}, r"calibration_tokens must be at least 2 \(got 1\)"),
        ({"eval_tokens": 0}, r"eval_tokens must be at least 2 \(got 0\)"),
        ({"looks": 0}, r"looks must lie in 1..100 \(got 0\)"),
        ({"smallest": "byte"}, "did you mean 'bytes'"),
        ({"engine": "lama.cpp"}, "did you mean 'llama.cpp'"),
        ({"without": ("ranks",)}, "did you mean 'rank'"),
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(RefoldError, match=says):
        FitOptions(**values)


def test_kinds_of_choice_are_left_out_by_name_but_not_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Squeeze(registry.PartKind):
        name = "squeeze"

    class Whole(registry.PartKind):
        name = "whole"

    monkeypatch.setattr(registry, "PART_KINDS", (Whole(), Squeeze()))
    assert choice_names() == ("bits", "rank", "rank and bits", "squeeze", "tie")
    assert FitOptions(without=("squeeze", "tie"), engine="any").without == ("squeeze", "tie")
    with pytest.raises(RefoldError, match=r"must be one of bits, .*squeeze, tie \(got 'whole'\)"):
        FitOptions(without=("whole",))
    with pytest.raises(RefoldError, match=r"at least one kind of choice must stay \(got all\)"):
        FitOptions(without=choice_names())
