"""The selective scan: its sum over pairs of tokens, decays at their limits, and transformers' slow path."""

from typing import Any

import pytest
import torch
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from refold.ops.selective_scan import chunked, naive

pytestmark = pytest.mark.parametrize("recurrence", ["scan"], indirect=True)


def test_outputs_equal_a_sum_over_pairs_of_tokens(recurrence: Any) -> None:
    inputs = recurrence.inputs(40, state=False)
    x, dt, a, b, c = (inputs[name] for name in ("x", "dt", "a", "b", "c"))
    passed = dt.cumsum(1)
    apart = (passed[:, :, None] - passed[:, None, :]).clamp(min=0)
    decays = torch.exp(apart[..., None] * a) * torch.ones(40, 40).tril()[None, :, :, None, None]
    wanted = torch.einsum("bijdn,bjd,bjn,bin->bid", decays, dt * x, b, c)
    torch.testing.assert_close(chunked(**inputs)[0], wanted)


@pytest.mark.parametrize("log_decay", [-50.0, -1e-6, 0.0])
def test_strong_and_no_decay_stay_finite_over_two_thousand_tokens(recurrence: Any, log_decay: float) -> None:
    inputs = recurrence.inputs(2000, torch.float32, batch=1)
    inputs["dt"] = torch.ones_like(inputs["dt"]).requires_grad_()
    inputs["a"] = torch.full_like(inputs["a"], log_decay).requires_grad_()
    out, state = chunked(**inputs)
    grads = torch.autograd.grad(out.square().sum() + state.sum(), list(inputs.values()))
    assert all(t.isfinite().all() for t in (out, state, *grads))
    for ours, theirs in zip((out, state), naive(**inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def test_what_is_kept_for_backward_does_not_hold_a_state_per_token(recurrence: Any) -> None:
    inputs = recurrence.inputs(640, size=16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked(**inputs)
    assert sum(kept) < 640 * 2 * (4 * 6 + 2 * 16) < 640 * 2 * 6 * 16


def test_outputs_states_and_gradients_equal_those_of_transformers(recurrence: Any) -> None:
    inputs = recurrence.inputs(70, torch.float32, state=False)
    x, dt, a, b, c = leaves = [inputs[name] for name in ("x", "dt", "a", "b", "c")]
    tokens_last = [t.transpose(1, 2) for t in (x, dt, b, c)]
    wanted, last = mamba_selective_scan(*tokens_last[:2], a, *tokens_last[2:], return_last_state=True)
    grads = torch.autograd.grad(wanted.square().sum(), leaves)
    for scan in (chunked, naive):
        out, state = scan(**inputs)
        torch.testing.assert_close((out, state), (wanted.transpose(1, 2), last), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaves), grads, rtol=1e-3, atol=1e-3)
