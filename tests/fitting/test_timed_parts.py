"""Times of the parts of a menu."""

from collections.abc import Callable
from typing import Any

import pytest

from refold.errors import RefoldError
from refold.fitting.device_table import DeviceTable, LinearTime, MeasuredMachine, PartTime
from refold.fitting.menu import Costs, MatrixForm, Menu, MenuMatrix, PartForm, PartMenu, TieForm
from refold.fitting.timed_parts import timed_parts

MACHINE = MeasuredMachine(processor="a processor", system="a system", threads=1, device="cpu", dtype="float32")


def make_table(**mixers: float) -> DeviceTable:
    linear = LinearTime(rows=32, columns=32, scheme=None, batch=1, milliseconds=0.01)
    times = [("attention", 4, context, 0.1 + context / 1000) for context in (16, 1000)]
    times += [("mlp", 0, 0, 0.05), *((kind, 4, 8, time) for kind, time in mixers.items())]
    parts = tuple(
        PartTime(kind=kind, hidden=32, heads=heads, head_dim=8 if heads else 0, context=at, batch=1, milliseconds=time)
        for kind, heads, at, time in times
    )
    return DeviceTable(machine=MACHINE, linears=(linear,), parts=parts, step={1: 0.5})


def make_menu() -> Menu:
    form = MatrixForm(rank=None, scheme=None, loss=0.0, costs=Costs(10, 0, 0, 0.01))
    matrices = (MenuMatrix(name="o_proj", forms=(form,)),)

    def part(kind: str, **setting: Any) -> PartForm:
        return PartForm(kind=kind, setting=setting, loss=0.0, costs=Costs(1), matrices=matrices)

    mixer = (
        part("whole"),
        part("width", groups=1),
        part("mixer", type="attention", window=100),
        part("mixer", type="linear_attention", window=8),
        part("share_kv", **{"from": 0}),
        PartForm(kind="drop", loss=1.0, costs=Costs()),
    )
    mlp = (part("whole"), part("width", neurons=32))
    parts = (PartMenu(layer=1, pool="mixer", forms=mixer), PartMenu(layer=1, pool="mlp", forms=mlp))
    ties = (TieForm(pool="mixer", layers=(1, 2), loss=0.1, costs=Costs(2), matrices=matrices),)
    return Menu(parts=parts, outer=(), ties=ties, fixed=Costs(5), source=Costs(100, 0, 0, 0.02), context=500)


def test_each_form_has_the_time_of_its_part(make_arch: Callable[..., Any]) -> None:
    made = timed_parts(make_menu(), make_table(linear_attention=0.2), make_arch())
    mixer, mlp = ([form.costs.milliseconds for form in part.forms] for part in made.parts)
    base = 0.1 + 16 / 1000
    whole, half = 0.1 + 0.5, base + (0.5 - 16 / 1000) / 2
    assert mixer == pytest.approx([whole, half, 0.2, 0.2, whole, 0.0])
    assert mlp == pytest.approx([0.05, 0.05])
    assert made.ties[0].costs.milliseconds == pytest.approx(2 * whole)
    assert made.fixed == Costs(5, 0, 0, 0.5)
    assert made.source.milliseconds == pytest.approx(0.02 + 0.5 + whole + 0.05)
    assert [form.costs.bytes for form in made.parts[0].forms] == [1, 1, 1, 1, 1, 0]


def test_a_window_of_the_source_limits_the_context(make_arch: Callable[..., Any]) -> None:
    arch = make_arch()
    layers = tuple(layer.model_copy(update={"window": 50}) for layer in arch.layers)
    windowed = arch.model_copy(update={"layers": layers})
    made = timed_parts(make_menu(), make_table(linear_attention=0.2), windowed)
    assert made.parts[0].forms[0].costs.milliseconds == pytest.approx(0.1 + 0.05)


def test_a_mixer_that_was_not_measured_is_refused(make_arch: Callable[..., Any]) -> None:
    with pytest.raises(RefoldError, match="times of linear_attention at batch 1 are required"):
        timed_parts(make_menu(), make_table(), make_arch())
