"""One decay per key channel: the token loop, the single step, the chunked form and the matrix are one recurrence."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from refold.ops import chunking
from refold.ops.channel_decay import chunked, matrix, naive, step

Inputs = Any  # a tuple of tensors and None


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows go through several segments."""
    monkeypatch.setattr(chunking, "CPU_SEGMENT_NUMBERS", 2 * 3 * 4 * 64**2)


def make(tokens: int, with_state: bool = True, dtype: torch.dtype = torch.float64) -> Inputs:
    """Queries, keys, values, log decays and state of 2 rows, 4 heads, K = 5, V = 3."""
    random = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=dtype).requires_grad_()

    q, k, v = normal(2, tokens, 4, 5), normal(2, tokens, 4, 5), normal(2, tokens, 4, 3)
    g = -torch.rand(2, tokens, 4, 5, generator=random, dtype=dtype) * 0.5
    return q, k, v, g.requires_grad_(), normal(2, 4, 5, 3) if with_state else None


def each(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """What the function makes of each tensor."""
    return tuple(x if x is None else function(x) for x in inputs)


def resets_at(tokens: int, *places: int) -> Tensor:
    """Documents of the first row begin at `places`; the second has one begin in the middle."""
    resets = torch.zeros(2, tokens, dtype=torch.bool)
    resets[0, [place for place in places if place < tokens]] = True
    resets[1, tokens // 2] = True
    return resets


def with_gradients(run: Callable[[], tuple[Tensor, Tensor]], inputs: Inputs) -> list[Tensor]:
    """Output, state, and the gradients of a fixed weighting of both."""
    out, state = run()
    random = torch.Generator().manual_seed(7)
    loss = sum((x.double() * torch.randn(x.shape, generator=random, dtype=torch.float64)).sum() for x in (out, state))
    return [out, state, *torch.autograd.grad(loss, [x for x in inputs if x is not None])]  # pyright: ignore


def assert_same(found: list[Tensor], wanted: list[Tensor], relative: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.isfinite().all()
        assert float((one - other).detach().abs().max()) <= relative * max(float(other.detach().abs().max()), 1e-3)


RESETS = {"no resets": None, "resets": (0, 1, 2, 16, 20, 32, 63, 64, 99)}


@pytest.mark.parametrize("resets", RESETS.values(), ids=RESETS)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65])
def test_chunked_is_naive(tokens: int, resets: tuple[int, ...] | None) -> None:
    where = None if resets is None else resets_at(tokens, *resets)
    for with_state, chunk_size in ((True, 16), (False, 64), (True, 1)):
        inputs = make(tokens, with_state)
        wanted = with_gradients(lambda inputs=inputs: naive(*inputs, resets=where), inputs)
        found = with_gradients(
            lambda inputs=inputs, size=chunk_size: chunked(*inputs, resets=where, chunk_size=size), inputs
        )
        assert_same(found, wanted, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_is_naive_over_many_tokens(dtype: torch.dtype) -> None:
    inputs = make(1000, dtype=dtype)
    where = resets_at(1000, 64, 500, 501, 960)
    wanted = with_gradients(lambda: naive(*inputs, resets=where), inputs)
    assert_same(
        with_gradients(lambda: chunked(*inputs, resets=where), inputs),
        wanted,
        1e-4 if dtype == torch.float32 else 1e-12,
    )
    assert wanted[1].dtype == dtype


def test_the_papers_quadratic_form_gives_the_same() -> None:
    """o_t = sum over s <= t of (q_t exp(g_{s+1} + ... + g_t)) k_s v_s, token by token as the paper writes it."""
    q, k, v, g, _ = each(Tensor.detach, make(40))
    out, wanted = torch.zeros(2, 40, 4, 3, dtype=torch.float64), torch.zeros(2, 4, 40, 40, dtype=torch.float64)
    for t in range(40):
        for s in range(t + 1):
            weight = (q[:, t] * k[:, s] * g[:, s + 1 : t + 1].sum(1).exp()).sum(-1)
            wanted[:, :, t, s] = weight
            out[:, t] += weight[..., None] * v[:, s]
    torch.testing.assert_close(chunked(q, k, v, g, chunk_size=16)[0], out)
    torch.testing.assert_close(matrix(q, k, g), wanted)


def test_the_matrix_mixes_values_as_the_recurrence_does() -> None:
    q, k, v, g, _ = inputs = make(70, with_state=False)
    where = resets_at(70, 0, 5, 6, 64)

    def mixed() -> tuple[Tensor, Tensor]:
        out = (matrix(q, k, g, where) @ v.transpose(1, 2)).transpose(1, 2)
        return out, naive(*inputs, resets=where)[1]

    wanted = with_gradients(lambda: naive(*inputs, resets=where), inputs)
    assert_same(with_gradients(mixed, inputs), wanted, 1e-12)


def test_steps_give_what_whole_rows_give() -> None:
    q, k, v, g, state = make(20)
    wanted, last = chunked(q, k, v, g, state)
    for t in range(20):
        out, state = step(q[:, t], k[:, t], v[:, t], g[:, t], state)
        torch.testing.assert_close(out, wanted[:, t])
    torch.testing.assert_close(state, last)


def test_packed_documents_are_as_if_alone() -> None:
    q, k, v, g, state = make(100)
    borders = [0, 1, 2, 40, 64, 100]
    where = torch.zeros(2, 100, dtype=torch.bool)
    where[:, borders[:-1]] = True
    out, last = chunked(q, k, v, g, state, where, chunk_size=16)
    for start, stop in pairwise(borders):
        alone, end = chunked(*(x[:, start:stop] for x in (q, k, v, g)), chunk_size=16)
        torch.testing.assert_close(out[:, start:stop], alone)
    torch.testing.assert_close(last, end)
    assert not torch.allclose(out[:, 2:], chunked(q, k, v, g, state)[0][:, 2:])


@pytest.mark.parametrize("cut", [1, 50, 64])
def test_a_call_goes_on_where_another_ended(cut: int) -> None:
    q, k, v, g, state = make(130)
    where = resets_at(130, 30, 100)
    wanted, last = chunked(q, k, v, g, state, where)
    first, state = chunked(*(x[:, :cut] for x in (q, k, v, g)), state=state, resets=where[:, :cut])
    second, state = chunked(*(x[:, cut:] for x in (q, k, v, g)), state=state, resets=where[:, cut:])
    torch.testing.assert_close(torch.cat([first, second], 1), wanted)
    torch.testing.assert_close(state, last)


def test_gradients_are_those_of_differences() -> None:
    inputs = make(7)
    where = resets_at(7, 2, 4, 5)
    assert torch.autograd.gradcheck(lambda *x: chunked(*x, resets=where, chunk_size=2), inputs, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: chunked(*x, chunk_size=4), inputs, fast_mode=True)
    assert torch.autograd.gradcheck(lambda q, k, g: matrix(q, k, g, where), (inputs[0], inputs[1], inputs[3]))


def test_bfloat16_is_close_to_float32_under_autocast_too() -> None:
    inputs = each(lambda x: x.detach().bfloat16(), make(100))
    wanted, last = chunked(*each(Tensor.float, inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for form in (chunked, naive):
            out, state = form(*inputs)
            assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
            torch.testing.assert_close(out.float(), wanted, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)
        leaf = inputs[2].clone().requires_grad_()
        chunked(inputs[0], inputs[1], leaf, inputs[3])[0].float().sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("strength", [-50.0, 0.0])
def test_strong_and_no_decay_stay_finite(strength: float) -> None:
    q, k, v, g, state = make(2000, dtype=torch.float32)
    g = torch.full_like(g, strength).requires_grad_()
    inputs = (q, k, v, g, state)
    out, last, *gradients = with_gradients(lambda: chunked(*inputs), inputs)
    assert all(x.isfinite().all() for x in (out, last, *gradients))
    if strength:
        own = (q * k).sum(-1)[..., None] * v
        torch.testing.assert_close(out, own)
        assert gradients[3].abs().max() < 1e-6
    assert matrix(q[:, :300], k[:, :300], g[:, :300]).isfinite().all()


def test_old_tokens_count_right_after_a_strong_decay() -> None:
    """What is kept over weak decays does not suffer from strong decays summed up before them."""
    q, k, v, g, _ = make(64, with_state=False, dtype=torch.float32)
    g = torch.where(torch.arange(64)[None, :, None, None] < 32, -50.0, g.detach() * 0.01)
    found, wanted = chunked(q, k, v, g)[0], naive(q.double(), k.double(), v.double(), g.double())[0]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_chunk_size_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"chunk_size: a power of two is required \(got 48\)"):
        chunked(*make(3), chunk_size=48)
