"""Attention by feature maps beside float64 quadratic forms written from the papers' equations."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from refold.mixers.spec import Fill
from refold.nn.fills import make_fill

GROUPS = 2


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight


def rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None].double() * 10000.0 ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def phi(lone: Any, x: Tensor, side: str) -> Tensor:
    """Features of queries (`q_map`) or keys (`k_map`) that carry the square root of the attention's scale."""
    name = lone.spec.feature_map
    if name == "elu":
        # arXiv 2006.16236, equation 7.
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    if name == "relu":
        return x.clamp(min=0)
    along = torch.einsum("bthk,hkf->bthf", x, lone.weight(f"{side}.weight"))
    if name == "t2r":
        # arXiv 2103.13076, equation 2.
        return along.clamp(min=0)
    if name == "hedgehog":
        # arXiv 2402.04347, equation 6, each feature divided by their sum.
        both = torch.cat((along.exp(), (-along).exp()), dim=-1)
        return both / both.sum(dim=-1, keepdim=True)
    # arXiv 2009.14794, equation 5.
    found = (along - x.square().sum(dim=-1, keepdim=True) / 2).exp() / math.sqrt(along.shape[-1])
    if name == "dijiang":
        # arXiv 2403.19928, section 4.2: the root of each frequency's weight on either side.
        found = found * lone.weight("map_weights.log").exp().sqrt()
    return found


def attend(lone: Any, x: Tensor) -> Tensor:
    """Sums of w_ni v_i, divided by those of w_ni: phi(q_n) . phi(k_i), and in a window softmax (arXiv 2410.10254)."""
    x = rms(x.double(), lone.weight("input_norm.weight"))
    query, key, value = (
        (x @ lone.weight(f"{name}.weight").T).unflatten(-1, (-1, lone.arch.head_dim))
        for name in ("q_proj", "k_proj", "v_proj")
    )
    query, key = rotate(query), rotate(key)
    key, value = (states.repeat_interleave(lone.arch.num_attention_heads // GROUPS, dim=2) for states in (key, value))
    root = math.sqrt(lone.arch.attention_scale)
    weights = torch.einsum("bnhf,bmhf->bhnm", phi(lone, query * root, "q_map"), phi(lone, key * root, "k_map")).tril()
    window = lone.spec.window
    if window:
        # Equation 6: softmax weights, divided by the largest, for the latest, and features for the others.
        place = torch.arange(x.shape[1])
        near = (place <= place[:, None]) & (place > place[:, None] - window)
        scores = torch.einsum("bnhk,bmhk->bhnm", query, key) * lone.arch.attention_scale
        scores = scores.masked_fill(~near, -torch.inf)
        soft = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        share = lone.weight("blend.share").sigmoid()[:, None, None]
        weights = torch.where(near, share * soft, (1 - share) * weights)
    if lone.spec.normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return torch.einsum("bhnm,bmhv->bnhv", weights, value).flatten(-2) @ lone.weight("o_proj.weight").T


MAPS = {
    "elu": {"feature_map": "elu"},
    "relu": {"feature_map": "relu"},
    "t2r": {"feature_map": "t2r", "features": 12},
    "hedgehog": {"feature_map": "hedgehog"},
    "favor": {"feature_map": "favor", "features": 20},
    "dijiang": {"feature_map": "dijiang", "features": 20},
}
WITHOUT_ZEROS = [name for name in MAPS if name not in ("relu", "t2r")]
"""Rectified features of a query may miss those of all keys: what such a token gets is not defined by the paper."""


def check(lone: Any, x: Tensor, prefills: tuple[int, ...] = (2, 66)) -> None:
    expected = attend(lone, x)
    tolerance = 1e-4 * expected.abs().max()
    assert (lone.run(x) - expected).abs().max() < tolerance
    for prefill in prefills:
        assert (lone.run_with_cache(x[:, :72], prefill) - expected[:, :72]).abs().max() < tolerance


@pytest.mark.parametrize("name", WITHOUT_ZEROS)
def test_features_are_divided_by_their_sum(make_mixer, hidden_states, name):
    check(make_mixer("linear_attention", **MAPS[name]), hidden_states)


@pytest.mark.parametrize("name", MAPS)
def test_features_without_normaliser(make_mixer, hidden_states, name):
    check(make_mixer("linear_attention", normalise=False, **MAPS[name]), hidden_states)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("window", [1, 7, 200])
def test_a_window_of_softmax_stands_before_the_features(make_mixer, hidden_states, name, window):
    check(make_mixer("linear_attention", window=window, **MAPS[name]), hidden_states, (60,))


@pytest.mark.parametrize("options", [{}, {"normalise": False}, {"window": 8}], ids=["sum", "no sum", "window"])
@pytest.mark.parametrize("size", [64, 128])
@torch.no_grad()
def test_random_features_of_large_heads_keep_their_scale(make_mixer, hidden_states, size, options):
    """Features of long keys are tiny, and directions grow with the head: neither may be lost or rescaled."""
    lone = make_mixer("linear_attention", arch={"head_dim": size}, feature_map="favor", features=2 * size, **options)
    shared = make_fill(Fill("orthogonal"), (4, size, 2 * size), torch.Generator().manual_seed(1))
    for side, scale in (("q", 0.5), ("k", 1.0 if size == 64 else 0.5)):
        lone.mixer.get_parameter(f"{side}_map.weight").copy_(shared)
        lone.mixer.get_parameter(f"{side}_proj.weight").mul_(scale)
    check(lone, hidden_states)


@pytest.mark.parametrize("change", [{"normalise": False}, {"window": 7}, {"feature_map": "hedgehog"}])
def test_each_option_shows(make_mixer, hidden_states, change):
    """The control: a reference that differs in one option is told apart."""
    lone = make_mixer("linear_attention", feature_map="elu")
    expected = attend(make_mixer("linear_attention", **{"feature_map": "elu", **change}), hidden_states)
    assert (lone.run(hidden_states) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("size", [16, 30])
@pytest.mark.parametrize("window", [0, 7, 20, 60])
def test_long_rows_in_pieces(make_mixer, hidden_states, monkeypatch, window, size):
    lone = make_mixer("linear_attention", window=window, **MAPS["hedgehog"])
    resets = torch.zeros(hidden_states.shape[:2], dtype=torch.bool)
    resets[:, 0] = resets[0, 5] = resets[0, 16] = resets[-1, 41] = True

    def run() -> list[Tensor]:
        x = hidden_states.clone().requires_grad_()
        y, _ = lone.mixer(x, lone.view, lone.context(x.shape[1], None, resets), {}, None)
        y.square().sum().backward()
        found = [y.detach(), x.grad, *(each.grad for each in lone.mixer.parameters())]
        lone.mixer.zero_grad()
        return [each for each in found if each is not None]

    whole = run()
    monkeypatch.setattr("refold.nn.mixers.linear_attention.TOKENS_AT_ONCE", size)
    for piece, expected in zip(run(), whole, strict=True):
        assert (piece - expected).abs().max() <= 2e-5 * expected.abs().max()
    check(lone, hidden_states)
