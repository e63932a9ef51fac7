"""Times of one decoded token through whole blueprints."""

from collections.abc import Callable
from typing import Any

import pytest

from refold.fitting.device_table import DeviceTable, LinearTime, MeasuredMachine, PartTime
from refold.fitting.step_times import blueprint_milliseconds
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe

MACHINE = MeasuredMachine(processor="a processor", system="a system", threads=1, device="cpu", dtype="float32")
TIMES = {"attention": ((16, 0.2), (1016, 1.2)), "linear_attention": ((0, 0.3), (64, 0.9)), "mlp": ((0, 0.05),)}


def make_table() -> DeviceTable:
    linear = LinearTime(rows=32, columns=32, scheme=None, batch=1, milliseconds=0.01)
    parts = (
        PartTime(
            kind=kind,
            hidden=32,
            heads=0 if kind == "mlp" else 4,
            head_dim=0 if kind == "mlp" else 8,
            context=context,
            batch=1,
            milliseconds=time,
        )
        for kind, times in TIMES.items()
        for context, time in times
    )
    return DeviceTable(machine=MACHINE, linears=(linear,), parts=tuple(parts), step={1: 0.5})


def part_times(arch: Any, recipe: dict[str, Any], context: int) -> float:
    """The time of a blueprint without its linears, head and step."""
    blueprint, table = build_blueprint(arch, load_recipe(recipe)).blueprint, make_table()
    silent = table.model_copy(
        update={"parts": tuple(each.model_copy(update={"milliseconds": 0.0}) for each in table.parts)}
    )
    return blueprint_milliseconds(blueprint, table, context) - blueprint_milliseconds(blueprint, silent, context)


@pytest.mark.parametrize(("window", "expected"), [(0, 0.3), (64, 0.9), (32, 0.6)])
def test_a_mixer_with_a_state_has_the_time_of_its_own_window(
    make_arch: Callable[..., Any], window: int, expected: float
) -> None:
    recipe = {"mixers": [{"type": "linear_attention", "window": window, "depths": [0, 1]}]}
    for context in (100, 8000):
        assert part_times(make_arch(2), recipe, context) == pytest.approx(2 * (expected + 0.05))


def test_attention_takes_longer_behind_a_longer_context_up_to_its_window(make_arch: Callable[..., Any]) -> None:
    arch = make_arch(2)
    assert part_times(arch, {}, 516) == pytest.approx(2 * (0.7 + 0.05))
    recipe = {"mixers": [{"type": "attention", "window": 116, "depths": [1]}]}
    assert part_times(arch, recipe, 516) == pytest.approx(0.7 + 0.3 + 2 * 0.05)
