"""The selective scan in chunks equals its token loop, its sum over pairs of tokens, and transformers' slow path."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from refold.ops.selective_scan import chunked, naive, step


class Inputs(NamedTuple):
    x: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    state: Tensor | None

    def tokens(self, start: int, stop: int, state: Tensor | None = None) -> "Inputs":
        x, dt, b, c = (t[:, start:stop] for t in (self.x, self.dt, self.b, self.c))
        return Inputs(x, dt, self.a, b, c, state)

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(t.detach().to(dtype) for t in self.given))

    @property
    def given(self) -> list[Tensor]:
        return [t for t in self if t is not None]


def make(tokens: int, dtype: torch.dtype = torch.float64, batch: int = 2, channels: int = 6, size: int = 4) -> Inputs:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, dt = normal(batch, tokens, channels), F.softplus(normal(batch, tokens, channels) - 1)
    a = -normal(channels, size).exp()
    b, c, state = normal(batch, tokens, size), normal(batch, tokens, size), normal(batch, channels, size)
    return Inputs(*(t.to(dtype).requires_grad_() for t in (x, dt, a, b, c, state)))


def resets_at(tokens: int, *places: int) -> Tensor:
    resets = torch.zeros(2, tokens, dtype=torch.bool)
    for row, place in enumerate(places):
        resets[row % 2, place % tokens] = True
    return resets


RESETS = (0, 0, 64, 65, 10, 11, 11, 30, 12, 16, 66, 32, 999, 40)


def check(inputs: Inputs, with_state: bool, resets: Tensor | None, tolerance: float) -> None:
    inputs = inputs if with_state else inputs._replace(state=None)
    found, wanted = chunked(*inputs, resets), naive(*inputs, resets)
    grads = tuple(torch.randn_like(t) for t in wanted)
    found += torch.autograd.grad(found, inputs.given, grads)
    wanted += torch.autograd.grad(wanted, inputs.given, grads)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65])
def test_chunks_equal_the_token_loop_in_outputs_and_gradients(tokens: int, with_state: bool, packed: bool) -> None:
    resets = resets_at(tokens, *RESETS) if packed else None
    check(make(tokens), with_state, resets, 1e-11)
    check(make(tokens, torch.float32), with_state, resets, 1e-4)


def test_a_thousand_tokens_equal_the_token_loop() -> None:
    check(make(1000, torch.float32), True, resets_at(1000, *RESETS), 1e-4)


@pytest.mark.parametrize("chunk_size", [1, 5, 64, 1000])
def test_the_size_of_chunks_changes_nothing(chunk_size: int) -> None:
    inputs = make(70)
    torch.testing.assert_close(chunked(*inputs, chunk_size=chunk_size), naive(*inputs))


def test_outputs_equal_a_sum_over_pairs_of_tokens() -> None:
    inputs = make(40)
    x, dt, a, b, c, _ = inputs.to(torch.float64)
    passed = dt.cumsum(1)
    apart = (passed[:, :, None] - passed[:, None, :]).clamp(min=0)
    decays = torch.exp(apart[..., None] * a) * torch.ones(40, 40).tril()[None, :, :, None, None]
    wanted = torch.einsum("bijdn,bjd,bjn,bin->bid", decays, dt * x, b, c)
    torch.testing.assert_close(chunked(*inputs._replace(state=None))[0], wanted)


def test_packed_documents_equal_documents_alone() -> None:
    inputs = make(100).to(torch.float64)
    places = (0, 7, 8, 16, 48, 51)
    resets = torch.zeros(2, 100, dtype=torch.bool)
    resets[:, list(places)] = True
    out, state = chunked(*inputs, resets)
    alone = [chunked(*inputs.tokens(start, stop)) for start, stop in pairwise((*places, 100))]
    torch.testing.assert_close(out, torch.cat([document for document, _ in alone], dim=1))
    torch.testing.assert_close(state, alone[-1][1])
    assert not torch.allclose(out, chunked(*inputs)[0])


@pytest.mark.parametrize("cut", [1, 16, 50])
def test_two_calls_with_the_state_handed_on_equal_one(cut: int) -> None:
    inputs = make(90)
    first, state = chunked(*inputs.tokens(0, cut, inputs.state))
    second, state = chunked(*inputs.tokens(cut, 90, state))
    torch.testing.assert_close((torch.cat([first, second], dim=1), state), chunked(*inputs))


def test_steps_continue_where_chunks_stopped() -> None:
    inputs = make(33)
    _, state = chunked(*inputs.tokens(0, 32, inputs.state))
    found = step(inputs.x[:, 32], inputs.dt[:, 32], inputs.a, inputs.b[:, 32], inputs.c[:, 32], state)
    out, last = chunked(*inputs)
    torch.testing.assert_close(found, (out[:, 32], last))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_finite_differences(packed: bool) -> None:
    inputs = make(7, channels=3, size=2)
    resets = resets_at(7, 0, 3, 4, 4, 5) if packed else None

    def scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return chunked(*Inputs(*tensors), resets, chunk_size=4)

    assert torch.autograd.gradcheck(scan, tuple(inputs.given))


def test_bfloat16_inputs_are_worked_on_in_float32_under_autocast_too() -> None:
    inputs = make(70).to(torch.bfloat16)
    full = inputs.to(torch.float32)
    for scan in (chunked, naive):
        wanted, last = scan(*full)
        with torch.autocast("cpu", torch.bfloat16):
            out, state = scan(*inputs._replace(state=full.state))
            assert torch.equal(scan(*full)[0], wanted)
        assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(out.float(), wanted, rtol=0.01, atol=0.01)
        torch.testing.assert_close(state, last)


@pytest.mark.parametrize("log_decay", [-50.0, -1e-6, 0.0])
def test_strong_and_no_decay_stay_finite_over_two_thousand_tokens(log_decay: float) -> None:
    inputs = make(2000, torch.float32, batch=1)
    inputs = inputs._replace(dt=torch.ones_like(inputs.dt).requires_grad_())
    inputs = inputs._replace(a=torch.full_like(inputs.a, log_decay).requires_grad_())
    out, state = chunked(*inputs)
    grads = torch.autograd.grad(out.square().sum() + state.sum(), inputs.given)
    assert all(t.isfinite().all() for t in (out, state, *grads))
    for ours, theirs in zip((out, state), naive(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def test_what_is_kept_for_backward_does_not_hold_a_state_per_token() -> None:
    inputs = make(640, size=16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked(*inputs)
    assert sum(kept) < 640 * 2 * (4 * 6 + 2 * 16) < 640 * 2 * 6 * 16


def test_outputs_states_and_gradients_equal_those_of_transformers() -> None:
    inputs = make(70, torch.float32)
    x, dt, a, b, c, _ = inputs
    tokens_last = [t.transpose(1, 2) for t in (x, dt, b, c)]
    wanted, last = mamba_selective_scan(*tokens_last[:2], a, *tokens_last[2:], return_last_state=True)
    leaves = inputs.given[:5]
    grads = torch.autograd.grad(wanted.square().sum(), leaves)
    for scan in (chunked, naive):
        out, state = scan(*inputs._replace(state=None))
        torch.testing.assert_close((out, state), (wanted.transpose(1, 2), last), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaves), grads, rtol=1e-3, atol=1e-3)
