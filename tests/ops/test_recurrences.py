"""The token loop, the single step, the chunked form and the matrix of every recurrence are equal."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("small_segments")

PLACES = (0, 1, 2, 10, 11, 16, 20, 32, 63, 64, 65, 99, 128)
ONE_EACH = pytest.mark.parametrize("recurrence", ["scalar-token-2", "channel", "delta", "scan"], indirect=True)
WITH_MATRIX = pytest.mark.parametrize(
    "recurrence", ["scalar-token-2", "scalar-head-2", "scalar-none-4", "channel", "delta", "delta-none"], indirect=True
)
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])


def resets_at(tokens: int, *places: int) -> Tensor:
    """Documents of the first row begin at `places`; the second has one begin in the middle."""
    resets = torch.zeros(2, tokens, dtype=torch.bool)
    resets[0, [place for place in places if place < tokens]] = True
    resets[1, tokens // 2] = True
    return resets


def assert_same(found: list[Tensor], wanted: list[Tensor], relative: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.isfinite().all()
        assert float((one - other).detach().abs().max()) <= relative * max(float(other.detach().abs().max()), 1e-3)


@PACKED
@pytest.mark.parametrize("tokens", [1, 16, 63, 64, 65, 150])
def test_chunked_is_naive_in_outputs_and_gradients(recurrence: Any, tokens: int, packed: bool) -> None:
    ops, resets = recurrence.ops, resets_at(tokens, *PLACES) if packed else None
    for state, dtype, tolerance in ((True, torch.float64, recurrence.tolerance), (False, torch.float32, 1e-4)):
        inputs = recurrence.inputs(tokens, dtype, state)
        wanted = recurrence.results(ops.naive, inputs, resets=resets)
        assert_same(recurrence.results(ops.chunked, inputs, resets=resets), wanted, tolerance)
        assert wanted[1].dtype == dtype


@pytest.mark.parametrize("chunk_size", [1, 16, 64])
def test_the_size_of_chunks_changes_nothing(recurrence: Any, chunk_size: int) -> None:
    ops, inputs, resets = recurrence.ops, recurrence.inputs(70, state=False), resets_at(70, *PLACES)
    wanted = recurrence.results(ops.naive, inputs, resets=resets)
    found = recurrence.results(ops.chunked, inputs, resets=resets, chunk_size=chunk_size)
    assert_same(found, wanted, recurrence.tolerance)


@pytest.mark.parametrize(
    ("recurrence", "chunk_size"),
    [("scalar-token-1", 24), ("scalar-head-4", 24), ("delta", 100), ("scan", 5), ("scan", 1000)],
    indirect=["recurrence"],
)
def test_chunks_need_not_be_powers_of_two(recurrence: Any, chunk_size: int) -> None:
    ops, inputs, resets = recurrence.ops, recurrence.inputs(130), resets_at(130, *PLACES)
    wanted = recurrence.results(ops.naive, inputs, resets=resets)
    found = recurrence.results(ops.chunked, inputs, resets=resets, chunk_size=chunk_size)
    assert_same(found, wanted, recurrence.tolerance)


@ONE_EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_is_naive_over_many_tokens(recurrence: Any, dtype: torch.dtype) -> None:
    ops, inputs, resets = recurrence.ops, recurrence.inputs(1000, dtype), resets_at(1000, 64, 500, 501, 960)
    wanted = recurrence.results(ops.naive, inputs, resets=resets)
    found = recurrence.results(ops.chunked, inputs, resets=resets)
    assert_same(found, wanted, 1e-4 if dtype == torch.float32 else recurrence.tolerance)


@WITH_MATRIX
@PACKED
def test_the_matrix_mixes_values_as_the_recurrence_does(recurrence: Any, packed: bool) -> None:
    inputs, resets = recurrence.inputs(130, state=False), resets_at(130, 0, 5, 6, 64) if packed else None

    def mixed(v: Tensor, state: None, **others: Tensor) -> tuple[Tensor, Tensor]:
        mixing = recurrence.ops.matrix(**others, resets=resets)
        assert mixing.triu(1).count_nonzero() == 0
        return (mixing @ v.transpose(1, 2)).transpose(1, 2), recurrence.ops.naive(**inputs, resets=resets)[1]

    wanted = recurrence.results(recurrence.ops.naive, inputs, resets=resets)
    assert_same(recurrence.results(mixed, inputs), wanted, recurrence.tolerance)


def test_steps_give_what_whole_rows_give(recurrence: Any, at: Any) -> None:
    ops, inputs = recurrence.ops, recurrence.inputs(70)
    wanted, last = ops.chunked(**inputs)
    for begin in (0, 50, 69):
        state = ops.chunked(**at(inputs, slice(begin), inputs["state"]))[1] if begin else inputs["state"]
        for t in range(begin, 70):
            out, state = ops.step(**at(inputs, t, state))
            torch.testing.assert_close(out, wanted[:, t])
        torch.testing.assert_close(state, last)


@ONE_EACH
def test_packed_documents_are_as_if_alone(recurrence: Any, at: Any) -> None:
    chunked, inputs = recurrence.ops.chunked, recurrence.inputs(200)
    borders = [0, 1, 2, 7, 8, 16, 40, 64, 128, 131, 200]
    resets = torch.zeros(2, 200, dtype=torch.bool)
    resets[:, borders[:-1]] = True
    for sizes in ({}, {"chunk_size": 16}):
        out, last = chunked(**inputs, resets=resets, **sizes)
        for start, stop in pairwise(borders):
            alone, end = chunked(**at(inputs, slice(start, stop)), **sizes)
            torch.testing.assert_close(out[:, start:stop], alone)
        torch.testing.assert_close(last, end)
        assert not torch.allclose(out[:, 2:], chunked(**inputs)[0][:, 2:])


@ONE_EACH
@PACKED
@pytest.mark.parametrize("cut", [1, 16, 50, 64, 100])
def test_a_call_goes_on_where_another_ended(recurrence: Any, at: Any, cut: int, packed: bool) -> None:
    chunked, inputs = recurrence.ops.chunked, recurrence.inputs(170)
    resets = resets_at(170, 30, 100) if packed else torch.zeros(2, 170, dtype=torch.bool)
    first, state = chunked(**at(inputs, slice(cut), inputs["state"]), resets=resets[:, :cut])
    second, state = chunked(**at(inputs, slice(cut, None), state), resets=resets[:, cut:])
    wanted = chunked(**inputs, resets=resets if packed else None)
    torch.testing.assert_close((torch.cat([first, second], 1), state), wanted)


@pytest.mark.parametrize("rows", [0, 2])
def test_no_tokens_and_no_rows_leave_the_state(recurrence: Any, rows: int) -> None:
    """A process may have no row in a step, or nothing new to take in."""
    inputs = recurrence.inputs(70 if rows == 0 else 3)
    kept = slice(rows) if rows == 0 else slice(None)
    fewer = {
        name: x if x is None or x.dim() < 2 or name == "a" else x[kept] if name == "state" or not rows else x[:, :0]
        for name, x in inputs.items()
    }
    fewer = {name: x if x is None else x.detach().requires_grad_() for name, x in fewer.items()}
    out, state = recurrence.ops.chunked(**fewer)
    assert out.numel() == 0
    assert torch.equal(state, fewer["state"])
    (out.sum() + state.sum()).backward()
    assert torch.equal(fewer["state"].grad, torch.ones_like(state))


@PACKED
def test_gradients_are_those_of_differences(recurrence: Any, packed: bool) -> None:
    inputs = recurrence.inputs(7, **recurrence.few)
    resets, chunk_size = (resets_at(7, 0, 2, 4, 5), 2) if packed else (None, 4)

    def run(*values: Tensor | None) -> tuple[Tensor, Tensor]:
        return recurrence.ops.chunked(**dict(zip(inputs, values, strict=True)), resets=resets, chunk_size=chunk_size)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=not recurrence.few)


@ONE_EACH
def test_bfloat16_is_worked_on_in_float32_under_autocast_too(recurrence: Any) -> None:
    inputs = {name: x.detach().bfloat16() for name, x in recurrence.inputs(130).items()}
    full = {name: x.float() for name, x in inputs.items()}
    values = "x" if "x" in inputs else "v"
    for run in (recurrence.ops.chunked, recurrence.ops.naive):
        wanted, last = run(**full)
        with torch.autocast("cpu", torch.bfloat16):
            out, state = run(**inputs | {"state": full["state"]})
            assert torch.equal(run(**full)[0], wanted)
            leaf = inputs[values].clone().requires_grad_()
            run(**inputs | {values: leaf, "state": None})[0].float().sum().backward()
        assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(out.float(), wanted, rtol=0.01, atol=0.01)
        torch.testing.assert_close(state, last)
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.bfloat16
