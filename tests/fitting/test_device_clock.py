"""Measured tables: a tiny model's times are there, positive, and reach a file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from refold.errors import RefoldError
from refold.fitting.device_clock import ClockSettings, measure_device
from refold.fitting.device_table import read_table
from refold.sources.source_model import read_source_model

SIZES = (32, 64, 128)
QUICK = ClockSettings(schemes=("int4",), contexts=(16, 64), windows=(8,), sizes=SIZES, seconds=0.001, moved_bytes=4096)


def test_a_source_is_measured_and_the_table_answers_for_its_shapes(
    make_source: Callable[..., Path], tmp_path: Path
) -> None:
    source, told = make_source("llama"), []
    table = measure_device(tmp_path / "device.json", source, QUICK, lambda done, total: told.append((done, total)))
    assert read_table(tmp_path / "device.json") == table
    arch = read_source_model(source).arch
    for shape in ((64, 32), (arch.vocab_size, arch.hidden_size)):
        of_shape = [each for each in table.linears if (each.rows, each.columns) == shape]
        measured = {each.scheme: each.milliseconds for each in of_shape}
        assert measured.keys() == {None, "int4"}
        assert all(0 < time < 1000 for time in measured.values())
        assert table.linear_ms(*shape, "int4") == measured["int4"]
    kinds = {(each.kind, each.context) for each in table.parts}
    assert kinds == {("mlp", 0), ("attention", 16), ("attention", 64), ("linear_attention", 8)}
    assert table.interpolation is not None
    assert table.machine.threads >= 1
    assert told[-1][0] == told[-1][1] == len(told) - 1
    assert [done for done, _ in told] == list(range(len(told)))


def test_larger_linears_take_longer(make_source: Callable[..., Path]) -> None:
    settings = ClockSettings(schemes=(), contexts=(16,), windows=(), sizes=(64, 1024), seconds=0.005)
    table = measure_device(source=make_source("llama"), settings=settings)
    assert table.linear_ms(1024, 1024, None) > 4 * table.linear_ms(64, 64, None)


def test_a_device_that_is_not_here_is_refused() -> None:
    with pytest.raises(RefoldError, match=r"device: one of this machine's devices is required \(got 'moon'"):
        measure_device(settings=ClockSettings(device="moon"))
