"""The delta rule: its quadratic form, decays at their limits, and transformers' implementation."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from refold.ops.delta_rule import chunked, naive

pytestmark = pytest.mark.parametrize("recurrence", ["delta"], indirect=True)


def test_without_decay_it_is_the_rule_with_decays_of_zero(recurrence: Any) -> None:
    zeros = recurrence.inputs(130)
    zeros["log_decay"] = torch.zeros_like(zeros["beta"])
    without = zeros | {"log_decay": None}
    wanted = naive(**zeros)
    for found in (naive(**without), chunked(**without), chunked(**zeros)):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_equal_a_product_of_transitions_per_pair_of_tokens(recurrence: Any, dtype: torch.dtype) -> None:
    inputs = recurrence.inputs(40, state=False)
    q, k, v, beta, decay = (inputs[name].detach()[0, :, 0] for name in ("q", "k", "v", "beta", "log_decay"))
    wanted = torch.zeros(40, 6, dtype=torch.float64)
    for t in range(40):
        for source in range(t + 1):
            key = k[source] * beta[source]
            for later in range(source + 1, t + 1):
                key = decay[later].exp() * (key - beta[later] * k[later] * (k[later] @ key))
            wanted[t] += (q[t] @ key) * v[source]
    found, _ = chunked(**recurrence.inputs(40, dtype, state=False))
    torch.testing.assert_close(
        found[0, :, 0].double(), wanted, rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 1e-12
    )


@pytest.mark.parametrize("log_decay", [-50.0, -1e-6, 0.0])
def test_strong_and_no_decay_stay_finite_over_two_thousand_tokens(recurrence: Any, log_decay: float) -> None:
    inputs = recurrence.inputs(2000, torch.float32, batch=1)
    inputs["k"] = F.normalize(inputs["k"].detach(), dim=-1).requires_grad_()
    inputs["log_decay"] = torch.full_like(inputs["beta"], log_decay).requires_grad_()
    out, state = chunked(**inputs)
    grads = torch.autograd.grad(out.square().sum() + state.sum(), list(inputs.values()))
    assert all(x.isfinite().all() for x in (out, state, *grads))
    torch.testing.assert_close((out, state), naive(**inputs), rtol=1e-4, atol=1e-5)


def test_what_is_kept_for_backward_grows_with_tokens_no_faster_than_the_inputs(recurrence: Any) -> None:
    inputs = recurrence.inputs(1024)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked(**inputs)
    assert sum(kept) < 1.5 * sum(x.numel() for x in inputs.values())


@pytest.mark.parametrize("theirs", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
def test_outputs_and_states_equal_those_of_transformers(recurrence: Any, theirs: Any) -> None:
    inputs = recurrence.inputs(130, torch.float32)
    q, k, v, beta, decay, state = inputs.values()
    wanted, last = theirs(
        q, k, v, decay, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    query, key = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    ours = inputs | {"q": query / 8**0.5, "k": key}  # they scale queries inside
    for rule in (chunked, naive):
        torch.testing.assert_close(rule(**ours), (wanted, last), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(chunked(**ours | {"log_decay": None})[0], wanted)
