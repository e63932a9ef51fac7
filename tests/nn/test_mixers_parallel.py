"""Retention and gated linear attention beside float64 parallel forms written from their papers' equations."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from refold.errors import RecipeError

EPS = 1e-5


def rms(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """arXiv 1910.07467, equation 4."""
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight


def rotate(x: Tensor) -> Tensor:
    """Turns the complex numbers x_j + i x_(j+4) of each head's first 8 by n / 10000^(j/4) (arXiv 2104.09864)."""
    angles = torch.arange(x.shape[1])[:, None].double() * 10000.0 ** (-torch.arange(4).double() / 4)
    turned = torch.complex(x[..., :4], x[..., 4:8]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag, x[..., 8:]), dim=-1)


def project(lone: Any, name: str, x: Tensor) -> Tensor:
    names = dict(lone.mixer.named_parameters())
    bias = lone.weight(f"{name}.bias") if f"{name}.bias" in names else 0.0
    return x @ lone.weight(f"{name}.weight").T + bias


def read(lone: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normed input, and its queries, keys and values `[B, T, H, K]`, one for each head."""
    x = rms(x.double(), lone.weight("input_norm.weight"))
    heads, size = lone.spec.heads, lone.spec.key_dim
    states = []
    for name, each in (("q_proj", size), ("k_proj", size), ("v_proj", lone.spec.value_dim)):
        state = project(lone, name, x)
        if lone.spec.activation == "silu":
            state = state * state.sigmoid()
        state = state.unflatten(-1, (-1, each))
        # Head h reads group h // (heads per group).
        states.append(state[:, :, torch.arange(heads) // (heads // state.shape[2])])
    if lone.spec.rotary:
        states[0], states[1] = rotate(states[0]), rotate(states[1])
    return x, *states


def finish(lone: Any, x: Tensor, mixed: Tensor) -> Tensor:
    """Norm, gate and output projection of heads `[B, T, H, V]`."""
    names = dict(lone.mixer.named_parameters())
    scale = lone.weight("heads.scale") if "heads.scale" in names else 1.0
    if lone.spec.norm == "head":
        mixed = rms(mixed, scale)
    mixed = mixed.flatten(-2)
    if lone.spec.norm == "full":
        mixed = rms(mixed, scale)
    if lone.spec.gate != "none":
        gate = project(lone, "g_proj", x)
        mixed = mixed * (gate.sigmoid() * gate if lone.spec.gate == "silu" else gate.sigmoid())
    return project(lone, "o_proj", mixed)


def retain(lone: Any, x: Tensor) -> Tensor:
    """(Q K^T * D) V with D_nm = gamma^(n-m), then norm and swish gate (arXiv 2307.08621, equations 5 and 8)."""
    x, query, key, value = read(lone, x)
    heads = torch.arange(lone.spec.heads).double()
    if lone.spec.decay == "retnet":
        gamma = 1 - 2 ** (-5 - heads)
    else:
        gamma = (-(2 ** (-8 * (heads + 1) / len(heads)))).exp()
    gamma = gamma**lone.spec.decay_scale
    scores = torch.einsum("bnhk,bmhk->bhnm", query, key)
    if lone.spec.norm != "full":
        scores = scores / math.sqrt(lone.spec.key_dim)
    place = torch.arange(x.shape[1])
    distance = place[:, None] - place
    fading = torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0.0)
    return finish(lone, x, torch.einsum("bhnm,bmhv->bnhv", scores * fading, value))


def attend_gated(lone: Any, x: Tensor) -> Tensor:
    """P V with P_ij = sum_k Q_ik K_jk B_ik / B_jk, B the decays' products (arXiv 2312.06635, section 4)."""
    x, query, key, value = read(lone, x)
    size = lone.spec.key_dim
    if lone.spec.decay_from == "keys":
        # Liger pools keys to as many numbers as they have (arXiv 2503.01496, section 3).
        raw = key
    else:
        raw = project(lone, "gk_proj_up", project(lone, "gk_proj_down", x)).unflatten(-1, (-1, size))
    alpha = raw.sigmoid() ** (1 / lone.spec.decay_divisor)
    if lone.spec.activation == "softmax":
        query, key = query.softmax(dim=-1), key.softmax(dim=-1)
    else:
        query = query / math.sqrt(size)
    logs = alpha.log().cumsum(dim=1)
    ratio = (logs[:, :, None] - logs[:, None]).clamp(max=0).exp()
    mixing = torch.einsum("bihk,bijhk,bjhk->bhij", query, ratio, key).tril()
    return finish(lone, x, torch.einsum("bhij,bjhv->bihv", mixing, value))


def check(lone: Any, expected: Tensor, x: Tensor) -> None:
    tolerance = 1e-4 * expected.abs().max()
    assert (lone.run(x) - expected).abs().max() < tolerance
    for prefill in (2, 66):
        assert (lone.run_with_cache(x[:, :72], prefill) - expected[:, :72]).abs().max() < tolerance


RETENTION = {
    "paper": {},
    "grouped": {"q_heads": 2, "k_heads": 1, "v_heads": 2, "key_dim": 6, "value_dim": 5, "rotary": False},
    "turned in part": {"heads": 2, "value_dim": 5},
    "more heads than the source": {"heads": 8, "rotary": False},
    "slopes": {"decay": "slopes", "decay_scale": 0.5, "norm": "full", "gate": "sigmoid", "activation": "silu"},
    "bare": {"rotary": False, "norm": "none", "gate": "none"},
}


@pytest.mark.parametrize("options", RETENTION.values(), ids=RETENTION)
def test_retention_is_its_parallel_form(make_mixer, hidden_states, options):
    lone = make_mixer("retention", **options)
    check(lone, retain(lone, hidden_states), hidden_states)


def test_retention_takes_the_biases_of_a_source(make_mixer, hidden_states):
    lone = make_mixer("retention", arch={"qkv_bias": True, "o_bias": True})
    check(lone, retain(lone, hidden_states), hidden_states)


def test_heads_smaller_than_the_rotary_embedding_are_refused(make_mixer):
    with pytest.raises(
        RecipeError, match=r"mixers\[0\]\.rotary: must be false where key heads are smaller.*heads of 4, and 8"
    ):
        make_mixer("retention", heads=8)


@pytest.mark.parametrize("change", [{"decay_scale": 1.1}, {"rotary": False}, {"norm": "none"}, {"gate": "sigmoid"}])
def test_each_option_of_retention_shows(make_mixer, hidden_states, change):
    """The control: a reference that differs in one option is told apart."""
    lone, other = make_mixer("retention"), make_mixer("retention", **change)
    expected = retain(other, hidden_states)
    assert (lone.run(hidden_states) - expected).abs().max() > 1e-2 * expected.abs().max()


GLA = {
    "paper": {},
    "Liger": {"decay_from": "keys", "activation": "softmax", "norm": "none", "gate": "none", "k_heads": 2},
    "keys": {"decay_from": "keys", "decay_divisor": 2.0},
    "grouped": {"q_heads": 2, "k_heads": 1, "v_heads": 2, "key_dim": 6, "value_dim": 5, "decay_rank": 3},
    "fast": {"decay_divisor": 0.25, "rotary": True},
}


@pytest.mark.parametrize("options", GLA.values(), ids=GLA)
def test_gla_is_its_parallel_form(make_mixer, hidden_states, options):
    lone = make_mixer("gla", **options)
    check(lone, attend_gated(lone, hidden_states), hidden_states)


@pytest.mark.parametrize("change", [{"decay_divisor": 20.0}, {"rotary": True}, {"norm": "none"}, {"gate": "none"}])
def test_each_option_of_gla_shows(make_mixer, hidden_states, change):
    lone, other = make_mixer("gla"), make_mixer("gla", **change)
    if change == {"gate": "none"}:
        other.mixer.load_state_dict({n: w for n, w in lone.mixer.state_dict().items() if n != "g_proj.weight"})
    expected = attend_gated(other, hidden_states)
    assert (lone.run(hidden_states) - expected).abs().max() > 1e-2 * expected.abs().max()
