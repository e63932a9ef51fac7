"""Softmax over the latest tokens, against a loop over tokens."""

import pytest
import torch

from refold.ops import window as module
from refold.ops.window import window_sums


def draw(tokens, window, heads=2, size=4):
    generator = torch.Generator().manual_seed(tokens * 100 + window)
    query = torch.randn(2, tokens, heads, size, generator=generator, dtype=torch.float64, requires_grad=True)
    keys, values = (
        torch.randn(2, window + tokens, heads, size, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    seen = torch.rand(2, tokens, window, generator=generator) < 0.7
    seen[..., -1] = True
    return query, keys, values, seen


def attended(query, keys, values, seen, window):
    """Computes plain softmax attention token by token, the reference for normalised sums."""
    rows = []
    for token in range(query.shape[1]):
        near = slice(token + 1, token + 1 + window)
        scores = torch.einsum("bhk,bshk->bhs", query[:, token], keys[:, near])
        weights = scores.masked_fill(~seen[:, token, None], -torch.inf).softmax(dim=-1)
        rows.append(torch.einsum("bhs,bshv->bhv", weights, values[:, near]))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize(("tokens", "window"), [(1, 1), (1, 5), (3, 5), (5, 5), (23, 4), (40, 1)])
@pytest.mark.parametrize("at_once", [7, 1024])
def test_normalised_sums_are_attention_with_its_gradients(monkeypatch, tokens, window, at_once):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", at_once)
    inputs = draw(tokens, window)
    summed, weights = window_sums(*inputs, window)
    found, expected = summed / weights, attended(*inputs, window)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    shade = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((found * shade).sum(), inputs[:3])
    theirs = torch.autograd.grad((expected * shade).sum(), inputs[:3])
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
