"""Tables of a device's times: interpolation, files, and a measurement of a tiny model."""

from pathlib import Path
from typing import Any

import pytest

from refold.errors import RefoldError
from refold.fitting.device_table import (
    DeviceTable,
    LinearTime,
    MeasuredMachine,
    PartTime,
    clock_of,
    describe_other_machine,
    interpolation_error,
    processor_name,
    read_table,
)

SIZES = (64, 256, 1024)
MACHINE = MeasuredMachine(processor="a processor", system="a system", threads=1, device="cpu", dtype="float32")


def law(rows: int, columns: int) -> float:
    """A power law, which a bilinear interpolation of logarithms meets exactly."""
    return 1e-5 * rows**0.8 * columns**0.9


def make_table(**changes: Any) -> DeviceTable:
    linears = tuple(
        LinearTime(rows=rows, columns=columns, scheme=scheme, batch=1, milliseconds=factor * law(rows, columns))
        for scheme, factor in ((None, 1.0), ("int4", 0.3))
        for rows in SIZES
        for columns in SIZES
    )
    parts = tuple(
        PartTime(kind="attention", hidden=256, heads=4, head_dim=64, context=context, batch=1, milliseconds=time)
        for context, time in ((64, 0.1), (512, 0.2), (1024, 0.4))
    )
    mlp = PartTime(kind="mlp", hidden=256, heads=0, head_dim=0, context=0, batch=1, milliseconds=0.05)
    given = {"machine": MACHINE, "linears": linears, "parts": (*parts, mlp), "step": {1: 0.3}}
    return DeviceTable(**{**given, **changes})


def test_measured_shapes_have_their_own_time_and_others_lie_between() -> None:
    clock = clock_of(make_table())
    for rows, columns in ((64, 1024), (100, 320), (700, 96)):
        assert clock(rows, columns, None, None) == pytest.approx(law(rows, columns))
        assert clock(rows, columns, "int4", None) == pytest.approx(0.3 * law(rows, columns))
    assert clock(100, 320, "int4", 64) == pytest.approx(0.3 * (law(64, 320) + law(100, 64)))
    assert clock(100, 320, None, 0) == 0.0


def test_above_the_grid_times_grow_with_weights_and_below_they_stay() -> None:
    clock = clock_of(make_table())
    assert clock(4096, 1024, None, None) == pytest.approx(4 * law(1024, 1024))
    assert clock(8, 8, None, None) == pytest.approx(law(64, 64))


def test_a_shape_that_was_too_large_is_taken_from_the_largest() -> None:
    kept = tuple(each for each in make_table().linears if each.rows * each.columns < 1024**2)
    assert clock_of(make_table(linears=kept))(1024, 1024, None, None) == pytest.approx(law(256, 1024) * 4, rel=0.3)


def test_errors_of_interpolation_are_those_of_left_out_shapes() -> None:
    table = make_table()
    exact = interpolation_error(table.linears)
    assert exact is not None
    assert exact.largest < 1e-9
    assert exact.points == 2 * 3 * 2
    bent = [
        each.model_copy(update={"milliseconds": 2 * each.milliseconds})
        if (each.rows, each.columns) == (256, 256)
        else each
        for each in table.linears
    ]
    found = interpolation_error(bent)
    assert found is not None
    # The doubled one is taken for half as long as it is; its neighbours lie at the border.
    assert found.largest == pytest.approx(0.5)
    assert interpolation_error(table.linears[:2]) is None


def test_integers_without_a_kernel_have_times_of_their_own() -> None:
    slow = LinearTime(rows=64, columns=80, scheme="int4", batch=1, milliseconds=9.0)
    table = make_table()
    with_slow = make_table(linears=(*table.linears, slow))
    assert with_slow.linear_ms(64, 80, "int4") == 9.0
    assert with_slow.linear_ms(64, 96, "int4") == table.linear_ms(64, 96, "int4") < 1.0
    # Floats have one grid for all columns.
    assert table.linear_ms(64, 80, None) == pytest.approx(law(64, 80))
    with pytest.raises(RefoldError, match=r"times of int4 at batch 1 with columns that are no multiple of 32"):
        table.linear_ms(64, 80, "int4")


def test_times_of_parts_follow_context_and_heads() -> None:
    table = make_table()
    assert table.part_ms("attention", 256, 256, 64) == pytest.approx(0.1)
    assert table.part_ms("attention", 256, 256, 288) == pytest.approx(0.15)
    assert table.part_ms("attention", 256, 256, 2048) == pytest.approx(0.8)
    # Half of the heads: half of what grows with the context.
    assert table.part_ms("attention", 256, 128, 1024) == pytest.approx(0.1 + 0.3 / 2)
    assert table.part_ms("mlp", 256, 0, 0) == 0.05
    assert (table.step_ms(), table.step_ms(batch=4)) == (0.3, 0.0)


def test_what_was_not_measured_is_refused() -> None:
    table = make_table()
    with pytest.raises(RefoldError, match=r"times of int8 at batch 1 are required \(it has floats at batch 1, int4"):
        table.linear_ms(64, 64, "int8")
    with pytest.raises(RefoldError, match=r"times of floats at batch 8 are required"):
        clock_of(table, batch=8)(64, 64, None, None)
    with pytest.raises(RefoldError, match=r"times of gla at batch 1 are required \(it has attention, mlp\)"):
        table.part_ms("gla", 256, 256, 64)


def test_a_table_is_written_and_read_back(tmp_path: Path) -> None:
    table, path = make_table(), tmp_path / "device.json"
    table.save(path)
    assert read_table(path) == table
    assert read_table(path).linear_ms(100, 320, "int4") == table.linear_ms(100, 320, "int4")


def test_damaged_older_and_missing_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    with pytest.raises(RefoldError, match=r"device\.json: a readable device table is required \(No such file"):
        read_table(path)
    make_table().save(path)
    text = path.read_text()
    for changed, message in (
        (text[: len(text) // 2], r"device\.json: a device table of format 1 is required \(file: Invalid JSON"),
        (text.replace('"format": 1', '"format": 0'), r"format 1 is required \(format: Input should be 1\)"),
        ("[]", r"format 1 is required \(file:"),
        (text.replace('"rows": 64', '"rows": "many"', 1), r"format 1 is required \(linears\.0\.rows: Input"),
    ):
        assert changed != text
        path.write_text(changed)
        with pytest.raises(RefoldError, match=message):
            read_table(path)


def test_another_machine_is_told() -> None:
    told = describe_other_machine(make_table())
    assert told is not None
    assert told.startswith("latency: measured on a processor, 1 threads, float32, engine refold (this machine: ")
    here = MACHINE.model_copy(update={"processor": processor_name()})
    assert describe_other_machine(make_table(machine=here)) is None
    assert describe_other_machine(make_table(machine=here), threads=1) is None
    assert "2 threads" in (describe_other_machine(make_table(machine=here), threads=2) or "")
    other = here.model_copy(update={"engine": "llama.cpp"})
    assert "engine llama.cpp" in (describe_other_machine(make_table(machine=other)) or "")
