"""The matrices of mixers give their outputs from values, and every weight of a mixer has an effect."""

from typing import Any

import pytest
import torch
from torch import Tensor

from refold.nn.mixers.attention import AttentionMixer
from refold.nn.mixers.headed import HeadedMixer
from refold.nn.mixers.registry import MIXERS

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", {}),
    "retention": ("retention", {"k_heads": 2, "value_dim": 5}),
    "lightning": ("retention", {"decay": "slopes", "norm": "full", "activation": "silu"}),
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {"q_heads": 2, "k_heads": 2, "key_dim": 6}),
    "mamba2 with mixed groups": ("mamba2", {"k_heads": 2, "v_heads": 1}),
    "gla": ("gla", {"k_heads": 2, "key_dim": 6}),
    "gla of keys": ("gla", {"decay_from": "keys", "activation": "softmax", "k_heads": 2}),
    "gated_deltanet": ("gated_deltanet", {"k_heads": 2, "q_heads": 2, "value_dim": 5}),
    "deltanet": ("gated_deltanet", {"decay": False, "conv": 0}),
    "features": ("linear_attention", {"feature_map": "hedgehog"}),
    "weighted features": ("linear_attention", {"feature_map": "dijiang", "features": 12}),
    "plain features": ("linear_attention", {"feature_map": "favor", "normalise": False}),
    "features and window": ("linear_attention", {"feature_map": "elu", "window": 7}),
}
WITHOUT_MATRIX = {"mamba"}
WITH_MATRIX = [name for name, (kind, _) in CASES.items() if kind not in WITHOUT_MATRIX]


def mix_by_matrix(lone: Any, x: Tensor, resets: Tensor | None) -> Tensor:
    """The mixer's output with the matrix in place of its recurrence."""
    mixer, context = lone.mixer, lone.context(x.shape[1], None, resets)
    matrix = lone.matrix(x, resets)
    with torch.no_grad():
        if isinstance(mixer, HeadedMixer):
            reads = mixer.read_inputs(x, context, {}, None)
            value = mixer.widen(reads.value)
            mixed = mixer.finish(reads, torch.einsum("bhts,bshv->bthv", matrix, value), {}, None)
        else:
            assert isinstance(mixer, AttentionMixer)
            value = mixer.read(x, context.rotation, {}, None)[2]
            value = value.repeat_interleave(matrix.shape[1] // value.shape[2], dim=2)
            mixed = torch.einsum("bhts,bshv->bthv", matrix, value).flatten(-2)
        return mixer.write(mixed, {}, None)


def test_every_mixer_stands_here():
    assert {kind for kind, _ in CASES.values()} == set(MIXERS)


@pytest.mark.parametrize("name", CASES)
def test_a_mixer_says_whether_it_has_a_matrix(make_mixer, name):
    kind, options = CASES[name]
    heads = make_mixer(kind, **options).mixer.num_matrix_heads
    assert heads == (None if kind in WITHOUT_MATRIX else 4)


@pytest.mark.parametrize(
    ("name", "is_packed"),
    [(name, is_packed) for name in WITH_MATRIX for is_packed in (False, True) if name != "attention" or not is_packed],
)
def test_the_matrix_does_to_values_what_the_mixer_does(make_mixer, hidden_states, name, is_packed):
    kind, options = CASES[name]
    lone = make_mixer(kind, **options)
    resets = None
    if is_packed:
        resets = torch.zeros(hidden_states.shape[:2], dtype=torch.bool)
        resets[0, [0, 3, 64, 101]] = True
        resets[1, 90] = True
    matrix, expected = lone.matrix(hidden_states, resets), lone.run(hidden_states, resets)
    assert matrix.shape == (2, 4, 130, 130)
    assert not matrix.triu(1).any()
    assert (mix_by_matrix(lone, hidden_states, resets) - expected).abs().max() < 1e-4 * expected.abs().max()
    if resets is not None:
        assert not matrix[0, :, 64:, :64].any()
        assert not matrix[1, :, 90:, :90].any()
        assert matrix[1, :, 63:90, :63].any()


@pytest.mark.parametrize("name", CASES)
def test_every_weight_counts(make_mixer, hidden_states, name):
    """The control of all comparisons with references: each of them would see a weight that is off."""
    kind, options = CASES[name]
    arch = {"qkv_bias": True, "o_bias": True}
    lone = make_mixer(kind, arch=arch, **options)
    expected = lone.run(hidden_states)
    for weight in lone.mixer.parameters():
        kept = weight.detach().clone()
        weight.data.mul_(1.2).add_(0.1 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(1)))
        assert (lone.run(hidden_states) - expected).abs().max() > 3e-3 * expected.abs().max()
        weight.data.copy_(kept)
    assert torch.equal(lone.run(hidden_states), expected)
