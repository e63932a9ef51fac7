import pytest

from refold.exporting.gguf.layouts import find_layout
from refold.exporting.gguf.windows import find_period, window_fields, window_obstacles
from refold.families.arch import Layer


def _layers(kinds: str) -> list[Layer]:
    return [Layer(window=8 if kind == "w" else None) for kind in kinds]


@pytest.mark.parametrize(
    ("kinds", "period"), [("wfwf", 2), ("wwfwwf", 3), ("wwfww", 3), ("ffff", 1), ("wwww", 0), ("wwwf", 4)]
)
def test_a_period_ends_in_a_layer_without_a_window(kinds: str, period: int):
    assert find_period(_layers(kinds)) == period


@pytest.mark.parametrize("kinds", ["fwfw", "wffw", "wwfwf"])
def test_other_orders_have_no_period_and_are_named(kinds: str):
    assert find_period(_layers(kinds)) is None
    layout = find_layout("gemma2")
    assert layout is not None
    assert kinds in window_obstacles(_layers(kinds), layout)[0].got


def test_the_period_is_written_where_it_is_not_the_default(make_arch):
    layout, arch = find_layout("gemma2"), make_arch(4)
    assert layout is not None
    assert window_fields(arch, _layers("wfwf"), layout).fields == {"{arch}.attention.sliding_window": 8}
    found = window_fields(arch, _layers("wwfww"), layout)
    assert found.fields["{arch}.attention.sliding_window_pattern"] == 3
    assert found.context == arch.max_position_embeddings


def test_without_windows_in_llama_cpp_the_context_is_the_window(make_arch):
    layout, arch = find_layout("mistral"), make_arch(2)
    assert layout is not None
    assert window_fields(arch, _layers("ff"), layout).notes == ()
    found = window_fields(arch, _layers("wf"), layout)
    assert found.context == 8
    assert found.fields == {}
    assert "the context length is 8 tokens instead of 2048, and the file is exact up to there" in found.notes[0]
