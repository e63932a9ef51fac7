"""The delta rule in chunks equals its token loop, its quadratic form, and what transformers makes of it."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from refold.ops.delta_rule import chunked, matrix, naive, step


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    state: Tensor | None

    def tokens(self, start: int, stop: int | None, state: Tensor | None = None) -> "Inputs":
        q, k, v, beta, decay = (x[:, start:stop] for x in self[:5] if x is not None)
        return Inputs(q, k, v, beta, decay, state)

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(x.detach().to(dtype) for x in self.given))

    @property
    def given(self) -> list[Tensor]:
        return [x for x in self if x is not None]


def make(tokens: int, dtype: torch.dtype = torch.float64, batch: int = 2, heads: int = 2, key: int = 8) -> Inputs:
    """Keys a little longer than 1: nothing may rely on their length."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (F.normalize(normal(batch, tokens, heads, key), dim=-1) * 1.1 for _ in range(2))
    v, state = normal(batch, tokens, heads, 6), normal(batch, heads, key, 6)
    beta = normal(batch, tokens, heads).sigmoid()
    decay = F.logsigmoid(normal(batch, tokens, heads) * 3)
    return Inputs(*(x.to(dtype).requires_grad_() for x in (q, k, v, beta, decay, state)))


def resets_at(tokens: int, *places: int) -> Tensor:
    resets = torch.zeros(2, tokens, dtype=torch.bool)
    for row, place in enumerate(places):
        resets[row % 2, place % tokens] = True
    return resets


RESETS = (0, 0, 64, 65, 10, 11, 11, 30, 12, 64, 66, 128, 999, 40)


def check(inputs: Inputs, with_state: bool, resets: Tensor | None, tolerance: float) -> None:
    inputs = inputs if with_state else inputs._replace(state=None)
    found, wanted = chunked(*inputs, resets), naive(*inputs, resets)
    grads = tuple(torch.randn_like(x) for x in wanted)
    found += torch.autograd.grad(found, inputs.given, grads)
    wanted += torch.autograd.grad(wanted, inputs.given, grads)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150])
def test_chunks_equal_the_token_loop_in_outputs_and_gradients(tokens: int, with_state: bool, packed: bool) -> None:
    resets = resets_at(tokens, *RESETS) if packed else None
    check(make(tokens), with_state, resets, 1e-11)
    check(make(tokens, torch.float32), with_state, resets, 1e-4)


def test_a_thousand_tokens_in_several_segments_equal_the_token_loop() -> None:
    check(make(1000, torch.float32, heads=10, key=4), True, resets_at(1000, *RESETS), 1e-4)


@pytest.mark.parametrize("chunk_size", [1, 16, 100])
def test_the_size_of_chunks_changes_nothing(chunk_size: int) -> None:
    inputs = make(130)
    torch.testing.assert_close(chunked(*inputs, chunk_size=chunk_size), naive(*inputs))


def test_without_decay_it_is_the_rule_with_decays_of_zero() -> None:
    inputs = make(130)._replace(log_decay=None)
    zeros = inputs._replace(log_decay=torch.zeros_like(inputs.beta))
    wanted = naive(*zeros)
    for found in (naive(*inputs), chunked(*inputs), chunked(*zeros)):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_equal_a_product_of_transitions_per_pair_of_tokens(dtype: torch.dtype) -> None:
    inputs = make(40)
    q, k, v, beta, decay = (x[0, :, 0] for x in inputs.to(torch.float64).given[:5])
    wanted = torch.zeros(40, 6, dtype=torch.float64)
    for t in range(40):
        for source in range(t + 1):
            key = k[source] * beta[source]
            for later in range(source + 1, t + 1):
                key = decay[later].exp() * (key - beta[later] * k[later] * (k[later] @ key))
            wanted[t] += (q[t] @ key) * v[source]
    found, _ = chunked(*inputs.to(dtype)._replace(state=None))
    torch.testing.assert_close(
        found[0, :, 0].double(), wanted, rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 1e-12
    )


@pytest.mark.parametrize("decaying", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_matrix_applied_to_values_gives_the_outputs(decaying: bool, packed: bool) -> None:
    inputs = make(130)._replace(state=None)
    resets = resets_at(130, *RESETS) if packed else None
    inputs = inputs if decaying else inputs._replace(log_decay=None)
    mixing = matrix(inputs.q, inputs.k, inputs.beta, inputs.log_decay, resets)
    assert mixing.triu(1).count_nonzero() == 0
    found = torch.einsum("bhij,bjhv->bihv", mixing, inputs.v)
    wanted, _ = naive(*inputs, resets)
    torch.testing.assert_close(found, wanted)
    leaves = (inputs.q, inputs.k, inputs.beta)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), leaves), torch.autograd.grad(wanted.square().sum(), leaves)
    )


def test_packed_documents_equal_documents_alone() -> None:
    inputs = make(200).to(torch.float64)
    places = (0, 7, 8, 64, 128, 131)
    resets = torch.zeros(2, 200, dtype=torch.bool)
    resets[:, list(places)] = True
    out, state = chunked(*inputs, resets)
    alone = [chunked(*inputs.tokens(start, stop)) for start, stop in pairwise((*places, 200))]
    torch.testing.assert_close(out, torch.cat([document for document, _ in alone], dim=1))
    torch.testing.assert_close(state, alone[-1][1])
    assert not torch.allclose(out, chunked(*inputs)[0])


@pytest.mark.parametrize("cut", [1, 64, 100])
def test_two_calls_with_the_state_handed_on_equal_one(cut: int) -> None:
    inputs = make(170)
    first, state = chunked(*inputs.tokens(0, cut, inputs.state))
    second, state = chunked(*inputs.tokens(cut, None, state))
    out, last = chunked(*inputs)
    torch.testing.assert_close((torch.cat([first, second], dim=1), state), (out, last))


def test_steps_continue_where_chunks_stopped() -> None:
    inputs = make(70)
    _, state = chunked(*inputs.tokens(0, 69, inputs.state))
    q, k, v, beta, decay = (x[:, 69] for x in inputs.given[:5])
    out, state = step(q, k, v, beta, decay, state)
    wanted, last = chunked(*inputs)
    torch.testing.assert_close((out, state), (wanted[:, 69], last))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_finite_differences(packed: bool) -> None:
    inputs = make(6, heads=1, key=2)
    resets = resets_at(6, 0, 3, 4, 4, 5) if packed else None

    def rule(*x: Tensor) -> tuple[Tensor, Tensor]:
        return chunked(*Inputs(*x), resets, chunk_size=3)

    assert torch.autograd.gradcheck(rule, tuple(inputs.given))


def test_bfloat16_inputs_are_worked_on_in_float32_under_autocast_too() -> None:
    inputs = make(130).to(torch.bfloat16)
    full = inputs.to(torch.float32)
    for rule in (chunked, naive):
        wanted, last = rule(*full)
        with torch.autocast("cpu", torch.bfloat16):
            out, state = rule(*inputs._replace(state=full.state))
            assert torch.equal(rule(*full)[0], wanted)
        assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(out.float(), wanted, rtol=0.01, atol=0.01)
        torch.testing.assert_close(state, last)


@pytest.mark.parametrize("log_decay", [-50.0, -1e-6, 0.0])
def test_strong_and_no_decay_stay_finite_over_two_thousand_tokens(log_decay: float) -> None:
    inputs = make(2000, torch.float32, batch=1)
    decays = torch.full_like(inputs.beta, log_decay).requires_grad_()
    inputs = inputs._replace(k=F.normalize(inputs.k, dim=-1), log_decay=decays)
    out, state = chunked(*inputs)
    grads = torch.autograd.grad(out.square().sum() + state.sum(), inputs.given)
    assert all(x.isfinite().all() for x in (out, state, *grads))
    wanted, last = naive(*inputs)
    torch.testing.assert_close((out, state), (wanted, last), rtol=1e-4, atol=1e-5)


def test_what_is_kept_for_backward_grows_with_tokens_no_faster_than_the_inputs() -> None:
    inputs = make(1024)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked(*inputs)
    assert sum(kept) < 1.5 * sum(x.numel() for x in inputs.given)


@pytest.mark.parametrize("theirs", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
def test_outputs_and_states_equal_those_of_transformers(theirs) -> None:
    q, k, v, beta, decay, state = make(130).to(torch.float32)
    wanted, last = theirs(
        q, k, v, decay, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    query, key = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    ours = Inputs(query / 8**0.5, key, v, beta, decay, state)  # they scale queries inside
    for rule in (chunked, naive):
        torch.testing.assert_close(rule(*ours), (wanted, last), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(chunked(*ours._replace(log_decay=None))[0], wanted)
