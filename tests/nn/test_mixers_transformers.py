"""Mixers beside transformers' own modules with the same weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Mamba2Config, MambaConfig, MiniMaxConfig, Qwen3NextConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from refold.mixers.mamba import Mamba

HIDDEN, HEADS = 32, 4
PREFILLS = (1, 2, 66)
"""Shorter than a convolution, and longer than a chunk."""
DECODED = 72
"""Tokens of which those after the prefill are taken one by one."""


def check(lone: Any, reference: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Holds outputs of whole rows, and those after a cache, against the reference's of the normed input."""
    expected = reference(lone.mixer.normalise("input_norm", x, None))
    tolerance = 1e-4 * expected.abs().max()
    assert (lone.run(x) - expected).abs().max() < tolerance
    assert (lone.run(x[:, :3]) - expected[:, :3]).abs().max() < tolerance
    for prefill in PREFILLS:
        assert (lone.run_with_cache(x[:, :DECODED], prefill) - expected[:, :DECODED]).abs().max() < tolerance


def randomise(module: nn.Module) -> dict[str, Tensor]:
    """Fills a reference's weights and returns them."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_scale = name in ("norm.weight", "D")
            weight.copy_(noise * (0.7 if name in ("A_log", "dt_bias", "dt_proj.bias") else 0.3) + is_scale)
    return {name: weight.detach() for name, weight in module.named_parameters()}


@pytest.mark.parametrize(("width", "state", "conv"), [(64, 16, 4), (40, 5, 2)])
@torch.no_grad()
def test_mamba_is_transformers_mamba(make_mixer, hidden_states, width, state, conv):
    config = MambaConfig(hidden_size=HIDDEN, state_size=state, conv_kernel=conv, num_hidden_layers=1)
    config.intermediate_size = width
    reference = MambaMixer(config, 0).eval()
    weights = randomise(reference)
    lone = make_mixer("mamba", width=width, state=state, conv=conv)
    assert lone.spec.dt_rank == config.time_step_rank
    inner, gate = weights["in_proj.weight"].chunk(2)
    lone.fill(
        input_norm__weight=lone.mixer.get_parameter("input_norm.weight"),
        in_proj_x__weight=inner,
        in_proj_z__weight=gate,
        conv1d__weight=weights["conv1d.weight"].squeeze(1),
        conv1d__bias=weights["conv1d.bias"],
        x_proj__weight=weights["x_proj.weight"],
        dt_proj__weight=weights["dt_proj.weight"],
        dt_proj__bias=weights["dt_proj.bias"],
        A_log=weights["A_log"],
        D=weights["D"],
        out_proj__weight=weights["out_proj.weight"],
    )
    for name, weight in weights.items():
        parts = [lone.mixer.get_parameter(part) for part in Mamba.foreign_names.get(name, (name,))]
        assert torch.equal(torch.cat(parts), weight.squeeze(1) if name == "conv1d.weight" else weight), name
    check(lone, reference, hidden_states)


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@torch.no_grad()
def test_mamba2_is_transformers_mamba2(make_mixer, hidden_states, groups):
    state, head = 6, 16
    config = Mamba2Config(
        hidden_size=HIDDEN,
        num_heads=HEADS,
        head_dim=head,
        expand=HEADS * head // HIDDEN,
        state_size=state,
        n_groups=groups,
        conv_kernel=4,
        chunk_size=32,
        num_hidden_layers=1,
        layer_norm_epsilon=1e-5,
    )
    reference = Mamba2Mixer(config, 0).eval()
    weights = randomise(reference)
    lone = make_mixer("mamba2", heads=HEADS, q_heads=groups, k_heads=groups, key_dim=state, value_dim=head)
    # The reference projects x, B and C in this order, the mixer C, B and x: queries, keys and values.
    sizes = [HEADS * head, groups * state, groups * state]
    gate, value, key, query, dt = weights["in_proj.weight"].split([HEADS * head, *sizes, HEADS])
    lone.fill(
        input_norm__weight=lone.mixer.get_parameter("input_norm.weight"),
        q_proj__weight=query,
        k_proj__weight=key,
        v_proj__weight=value,
        g_proj__weight=gate,
        dt_proj__weight=dt,
        conv1d__weight=torch.cat(weights["conv1d.weight"].squeeze(1).split(sizes)[::-1]),
        conv1d__bias=torch.cat(weights["conv1d.bias"].split(sizes)[::-1]),
        dt_bias=weights["dt_bias"],
        A_log=weights["A_log"],
        D=weights["D"],
        heads__scale=weights["norm.weight"],
        o_proj__weight=weights["out_proj.weight"],
    )
    check(lone, reference, hidden_states)


@pytest.mark.parametrize("key_heads", [2, HEADS])
@torch.no_grad()
def test_gated_deltanet_is_transformers_gated_delta_rule(make_mixer, hidden_states, key_heads):
    key_dim, value_dim = 6, 10
    config = Qwen3NextConfig(
        hidden_size=HIDDEN,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        linear_conv_kernel_dim=4,
        num_hidden_layers=4,
        rms_norm_eps=1e-5,
    )
    reference = Qwen3NextGatedDeltaNet(config, 0).eval()
    weights = randomise(reference)
    lone = make_mixer(
        "gated_deltanet", heads=HEADS, q_heads=key_heads, k_heads=key_heads, key_dim=key_dim, value_dim=value_dim
    )
    served = HEADS // key_heads
    # Stored by key head: its query, key, values and gates.
    fused = weights["in_proj_qkvz.weight"].unflatten(0, (key_heads, -1))
    parts = fused.split([key_dim, key_dim, served * value_dim, served * value_dim], dim=1)
    query, key, value, gate = (part.flatten(0, 1) for part in parts)
    beta, decay = (
        part.flatten(0, 1) for part in weights["in_proj_ba.weight"].unflatten(0, (key_heads, -1)).chunk(2, 1)
    )
    lone.fill(
        input_norm__weight=lone.mixer.get_parameter("input_norm.weight"),
        q_proj__weight=query,
        k_proj__weight=key,
        v_proj__weight=value,
        g_proj__weight=gate,
        b_proj__weight=beta,
        a_proj__weight=decay,
        conv1d__weight=weights["conv1d.weight"].squeeze(1),
        dt_bias=weights["dt_bias"],
        A_log=weights["A_log"],
        heads__scale=weights["norm.weight"],
        o_proj__weight=weights["out_proj.weight"],
    )
    check(lone, reference, hidden_states)


@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_retention_with_slopes_is_transformers_lightning_attention(make_mixer, hidden_states, layer):
    layers, head = 4, 8
    config = MiniMaxConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=head,
        num_hidden_layers=layers,
        block_size=16,
    )
    reference = MiniMaxLightningAttention(config, layer).eval()
    weights = randomise(reference)
    lone = make_mixer(
        "retention",
        decay="slopes",
        decay_scale=1 - layer / (layers - 1 + 1e-5) + 1e-5,
        activation="silu",
        norm="full",
        gate="sigmoid",
        rotary=False,
    )
    fused = weights["qkv_proj.weight"].unflatten(0, (HEADS, 3, head))
    query, key, value = (fused[:, part].flatten(0, 1) for part in range(3))
    lone.fill(
        input_norm__weight=lone.mixer.get_parameter("input_norm.weight"),
        q_proj__weight=query,
        k_proj__weight=key,
        v_proj__weight=value,
        g_proj__weight=weights["output_gate.weight"],
        heads__scale=weights["norm.weight"],
        o_proj__weight=weights["out_proj.weight"],
    )
    check(lone, lambda x: reference(x, (x, x), None)[0], hidden_states)
