"""LoRA pairs, norms and rotations by their formulas."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig

from refold.families.arch import Norm, Rope
from refold.nn.lora import Adapter, LoraPairs
from refold.nn.norms import StackNorm
from refold.nn.part import StoredPart
from refold.nn.rotary import Rotary, inverse_frequencies, rotate


def test_a_pair_adds_b_a_x_at_scale_one():
    x, y = torch.randn(2, 3, 5), torch.randn(2, 3, 7)
    a, b = torch.randn(4, 5), torch.randn(7, 4)
    assert torch.allclose(Adapter((a, b)).apply(y, x), y + x @ (b @ a).T, atol=1e-5)


def test_a_new_pair_adds_nothing_and_trains():
    pairs: Any = LoraPairs({"q_proj": (4, 5, 7)})
    x = torch.randn(3, 5)
    out = Adapter(pairs()["q_proj"]).apply(torch.zeros(3, 7), x)
    assert not out.any()
    out.sum().backward()
    grad = pairs["q_proj"].b.grad
    assert grad is not None
    assert grad.any()


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_is_its_formula(offset):
    norm = StackNorm(Norm(eps=0.1, offset=offset), 6)
    assert norm.weight is not None
    assert torch.equal(norm.weight, torch.full((6,), 1 - offset))
    nn.init.normal_(norm.weight)
    x = torch.randn(4, 6)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * (offset + norm.weight)
    assert torch.allclose(norm(x), expected, atol=1e-6)
    half = x.bfloat16()
    assert norm.bfloat16()(half).dtype == torch.bfloat16


def test_layer_norm_takes_the_weights_that_a_depth_brings():
    stored = StackNorm(Norm(kind="layer", bias=True), 6)
    bare = StackNorm(Norm(kind="layer", bias=True), 6, stored=False)
    assert not list(bare.parameters())
    x, weight, bias = torch.randn(4, 6), torch.randn(6), torch.randn(6)
    assert torch.allclose(bare(x, weight, bias), nn.functional.layer_norm(x, (6,), weight, bias, 1e-6))
    assert torch.allclose(stored(x), nn.functional.layer_norm(x, (6,), eps=1e-6))


def test_a_part_runs_with_its_own_vectors_or_with_those_it_is_given():
    spec = Norm(kind="layer", bias=True)
    vectors = {"input_norm.weight": (5,), "input_norm.bias": (5,), "up.bias": (7,)}
    stored = StoredPart({"up": (7, 5)}, vectors, spec, stores_vectors=True)
    bare = StoredPart({"up": (7, 5)}, vectors, spec, stores_vectors=False)
    assert set(dict(bare.named_parameters())) == {"up.weight"}
    for weight in stored.parameters():
        nn.init.normal_(weight)
    bare.load_state_dict({"up.weight": stored.get_parameter("up.weight")})
    given = {name: stored.get_parameter(name) for name in vectors}
    x, pair = torch.randn(2, 5), (torch.randn(3, 5), torch.randn(7, 3))
    for lora in ({}, {"up": Adapter(pair)}):
        mine = stored.project("up", stored.normalise("input_norm", x, None), lora, None)
        its = bare.project("up", bare.normalise("input_norm", x, given), lora, given)
        assert torch.allclose(mine, its, atol=1e-5)


def test_a_basis_is_read_by_the_coefficients_it_is_given():
    part = StoredPart({"up": (7, 5)}, {"up.bias": (7,)}, Norm(), stores_vectors=True)
    part.share_bases({"up": 3})
    assert {name: tuple(each.shape) for name, each in part.named_parameters()} == {
        "up.a.weight": (3, 5),
        "up.bias": (7,),
    }
    bias, a = nn.init.normal_(part.get_parameter("up.bias")), part.get_parameter("up.a.weight")
    x, pair = torch.randn(2, 5), (torch.randn(2, 5), torch.randn(7, 2))
    for coefficients in torch.randn(2, 7, 3):
        alone, relaxed = (part.project("up", x, {"up": Adapter(each, coefficients)}, None) for each in (None, pair))
        assert torch.allclose(alone, x @ (coefficients @ a).T + bias, atol=1e-5)
        assert torch.allclose(relaxed, alone + x @ (pair[1] @ pair[0]).T, atol=1e-5)


@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_rotation_turns_pairs_by_the_position_and_leaves_the_rest(rotary_dim):
    x = torch.randn(2, 5, 3, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 0, 1, 9, 30]])
    turned = rotate(x, Rotary(Rope(rotary_dim=rotary_dim, theta=50.0), 64)(positions, torch.float32))
    half = rotary_dim // 2
    assert torch.equal(turned[..., rotary_dim:], x[..., rotary_dim:])
    for pair in range(half):
        angle = positions / 50.0 ** (2 * pair / rotary_dim)
        number = torch.complex(x[..., pair], x[..., pair + half])
        expected = number * torch.polar(torch.ones_like(angle), angle)[..., None]
        assert torch.allclose(turned[..., pair], expected.real, atol=1e-5)
        assert torch.allclose(turned[..., pair + half], expected.imag, atol=1e-5)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 3.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_frequencies_are_those_of_transformers_on_the_meta_device_too(scaling):
    kind = scaling["rope_type"]
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=512)
    config.rope_parameters = {**scaling, "rope_theta": 99.0}
    expected, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    numbers = {name: value for name, value in scaling.items() if name != "rope_type"}
    rope = Rope.model_validate({"kind": kind, "theta": 99.0, "rotary_dim": 16, "scaling": numbers})
    with torch.device("meta"):
        found, factor = inverse_frequencies(rope, 512)
    assert torch.equal(found, expected)
    assert factor == 1.0
