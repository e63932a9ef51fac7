"""Recurrences with decays per head or per key channel: formulas of their papers, and decays at their limits."""

from typing import Any

import pytest
import torch

from refold.ops.chunking import pairwise_decay

pytestmark = pytest.mark.usefixtures("small_segments")
BOTH = pytest.mark.parametrize("recurrence", ["scalar-token-2", "channel"], indirect=True)


@pytest.mark.parametrize("recurrence", ["scalar-token-2", "scalar-head-2", "scalar-none-2", "channel"], indirect=True)
@torch.no_grad()
def test_the_papers_quadratic_form_gives_the_same(recurrence: Any) -> None:
    """o_t = sum over s <= t of (q_t exp(g_{s+1} + ... + g_t)) k_s v_s, token by token as the papers write it."""
    inputs = recurrence.inputs(40, state=False)
    q, k, v, g = (inputs[name] for name in ("q", "k", "v", "log_decay"))
    queries, keys = (x.repeat_interleave(4 // q.shape[2], 2) for x in (q, k))
    decays = torch.zeros(2, 40, 4, 1, dtype=torch.float64)
    if g is not None:
        decays = g if g.dim() == 4 else g.expand(2, 40, 4)[..., None]
    out, wanted = torch.zeros(2, 40, 4, 3, dtype=torch.float64), torch.zeros(2, 4, 40, 40, dtype=torch.float64)
    for t in range(40):
        for s in range(t + 1):
            weight = (queries[:, t] * keys[:, s] * decays[:, s + 1 : t + 1].sum(1).exp()).sum(-1)
            wanted[:, :, t, s] = weight
            out[:, t] += weight[..., None] * v[:, s]
    torch.testing.assert_close(recurrence.ops.chunked(**inputs, chunk_size=16)[0], out)
    torch.testing.assert_close(recurrence.ops.matrix(q, k, g), wanted[:, :: 4 // q.shape[2]] if g is None else wanted)


@BOTH
@pytest.mark.parametrize("strength", [-50.0, 0.0])
def test_strong_and_no_decay_stay_finite(recurrence: Any, strength: float) -> None:
    inputs = recurrence.inputs(2000, torch.float32)
    q, k, v, g = (inputs[name] for name in ("q", "k", "v", "log_decay"))
    inputs["log_decay"] = g = torch.full_like(g, strength).requires_grad_()
    results = recurrence.results(recurrence.ops.chunked, inputs)
    assert all(x.isfinite().all() for x in results)
    if strength:
        own = (q * k).sum(-1).repeat_interleave(4 // q.shape[2], dim=2)[..., None] * v
        torch.testing.assert_close(results[0], own)
        assert results[2 + list(inputs).index("log_decay")].abs().max() < 1e-6
    assert recurrence.ops.matrix(q[:, :300], k[:, :300], g[:, :300]).isfinite().all()


@BOTH
def test_old_tokens_count_right_after_a_strong_decay(recurrence: Any) -> None:
    """Checks that values under weak decays stay exact after the sum of strong decays before them."""
    inputs = recurrence.inputs(64, torch.float32, state=False)
    g = inputs["log_decay"].detach()
    early = (torch.arange(64) < 32).view(1, 64, *[1] * (g.dim() - 2))
    inputs["log_decay"] = torch.where(early, -50.0, g * 0.01)
    found, _ = recurrence.ops.chunked(**inputs)
    wanted, _ = recurrence.ops.naive(**{name: None if x is None else x.double() for name, x in inputs.items()})
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recurrence", ["channel"], indirect=True)
def test_gradients_of_the_matrix_of_channels_are_those_of_differences(recurrence: Any) -> None:
    inputs = recurrence.inputs(7)
    resets = torch.zeros(2, 7, dtype=torch.bool)
    resets[0, [2, 4, 5]] = resets[1, 3] = True
    leaves = tuple(inputs[name] for name in ("q", "k", "log_decay"))
    assert torch.autograd.gradcheck(lambda *x: recurrence.ops.matrix(*x, resets), leaves, fast_mode=True)


@pytest.mark.parametrize("recurrence", ["channel"], indirect=True)
def test_a_chunk_size_that_cannot_be_halved_is_refused(recurrence: Any) -> None:
    with pytest.raises(AssertionError, match=r"chunk_size: a power of two is required \(got 48\)"):
        recurrence.ops.chunked(**recurrence.inputs(3), chunk_size=48)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("share", [0.05, 0.3])
@pytest.mark.parametrize("recurrence", ["scalar-token-4", "scalar-token-2", "delta", "channel"], indirect=True)
def test_weak_decays_keep_their_digits_beside_strong_ones(recurrence: Any, share: float, tokens: int) -> None:
    """Outputs, states and gradients of float32 chunks lie within 1e-5 of a token loop in float64."""
    inputs = recurrence.inputs(tokens, torch.float32)
    g = inputs["log_decay"].detach()
    is_strong = torch.rand(g.shape, generator=torch.Generator().manual_seed(tokens)) < share
    inputs["log_decay"] = torch.where(is_strong, -60.0, 0.1 * g).requires_grad_()
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    found = recurrence.results(recurrence.ops.chunked, inputs)
    wanted = recurrence.results(recurrence.ops.naive, exact)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).detach().abs().max()) <= 1e-5 * max(float(other.detach().abs().max()), 1e-6)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 63, 64])
def test_pairwise_decays_are_those_of_float64(size: int) -> None:
    random = torch.Generator().manual_seed(size)
    decays = -torch.rand(3, size, generator=random)
    decays = torch.where(torch.rand(3, size, generator=random) < 0.3, -60.0, decays)
    sums = decays.double().cumsum(-1)
    wanted = (sums[..., :, None] - sums[..., None, :]).exp().tril()
    torch.testing.assert_close(pairwise_decay(decays).double(), wanted, rtol=2e-6, atol=1e-12)
    # Subtracting float32 sums is what loses them.
    if size > 16:
        lossy = decays.cumsum(-1)
        lossy = (lossy[..., :, None] - lossy[..., None, :]).exp().tril().double()
        assert float((lossy - wanted).abs().max()) > 1e-5
