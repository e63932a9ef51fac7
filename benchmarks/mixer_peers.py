"""Linear-cost mixers of transformers, each with refold's mixer of the same weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from mixer_work import HEAD_SIZE, HEADS, SCAN_STATE, WIDTH, LoneMixer, Work
from torch import Tensor, nn
from transformers import Mamba2Config, MambaConfig, MiniMaxConfig, Qwen3NextConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

CONV = 4
CHUNK = 64
"""Chunk size of Mamba2: that of refold, and faster for Mamba2 here than its default of 256."""


@dataclass(frozen=True)
class Pair:
    """A peer and refold's mixer in its place.

    Attributes:
        theirs: Transformers' module.
        call: Runs it on a row.
        ours: Refold's mixer with the same weights. Its time includes the input norm, which is not in the peer's.
    """

    theirs: nn.Module
    call: Callable[[Tensor], Tensor]
    ours: LoneMixer

    def works(self, tokens: int) -> tuple[Work, Work]:
        """Refold's and the peer's on the same row."""
        x = torch.randn(1, tokens, WIDTH, requires_grad=True)
        theirs = Work(lambda: self.call(x), [x, *self.theirs.parameters()])
        return Work(self.ours.bind(x), [x, *self.ours.mixer.parameters()]), theirs

    @torch.no_grad()
    def difference(self, tokens: int) -> float:
        """Largest difference of outputs, as a share of the largest."""
        x = torch.randn(1, tokens, WIDTH)
        theirs = self.call(self.ours.mixer.normalise("input_norm", x, None))
        return float((self.ours.bind(x)() - theirs).abs().max() / theirs.abs().max())


def mamba() -> Pair:
    config = MambaConfig(hidden_size=WIDTH, state_size=SCAN_STATE, conv_kernel=CONV, num_hidden_layers=1)
    theirs = MambaMixer(config, 0).eval()
    weights = dict(theirs.named_parameters())
    inner, gate = weights["in_proj.weight"].chunk(2)
    ours = LoneMixer("mamba", {"type": "mamba", "state": SCAN_STATE, "conv": CONV})
    _fill(
        ours,
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
    return Pair(theirs, theirs, ours)


def mamba2() -> Pair:
    config = Mamba2Config(
        hidden_size=WIDTH,
        num_heads=HEADS,
        head_dim=HEAD_SIZE,
        expand=1,
        state_size=HEAD_SIZE,
        n_groups=HEADS,
        conv_kernel=CONV,
        chunk_size=CHUNK,
        num_hidden_layers=1,
        layer_norm_epsilon=1e-6,
    )
    theirs = Mamba2Mixer(config, 0).eval()
    weights = dict(theirs.named_parameters())
    # The peer projects x, B and C in this order, refold C, B and x: queries, keys and values.
    gate, value, key, query, dt = weights["in_proj.weight"].split([WIDTH] * 4 + [HEADS])
    ours = LoneMixer("mamba2", {"type": "mamba2", "conv": CONV})
    _fill(
        ours,
        q_proj__weight=query,
        k_proj__weight=key,
        v_proj__weight=value,
        g_proj__weight=gate,
        dt_proj__weight=dt,
        conv1d__weight=torch.cat(weights["conv1d.weight"].squeeze(1).split(WIDTH)[::-1]),
        conv1d__bias=torch.cat(weights["conv1d.bias"].split(WIDTH)[::-1]),
        dt_bias=weights["dt_bias"],
        A_log=weights["A_log"],
        D=weights["D"],
        heads__scale=weights["norm.weight"],
        o_proj__weight=weights["out_proj.weight"],
    )
    return Pair(theirs, theirs, ours)


def gated_delta_rule() -> Pair:
    config = Qwen3NextConfig(
        hidden_size=WIDTH,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=HEAD_SIZE,
        linear_value_head_dim=HEAD_SIZE,
        linear_conv_kernel_dim=CONV,
        num_hidden_layers=4,
        rms_norm_eps=1e-6,
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0).eval()
    weights = dict(theirs.named_parameters())
    # Stored by head: its query, key, values and gates.
    fused = weights["in_proj_qkvz.weight"].unflatten(0, (HEADS, 4, HEAD_SIZE))
    query, key, value, gate = (part.flatten(0, 1) for part in fused.unbind(1))
    beta, decay = weights["in_proj_ba.weight"].unflatten(0, (HEADS, 2)).unbind(1)
    ours = LoneMixer("gated_deltanet", {"type": "gated_deltanet", "conv": CONV})
    _fill(
        ours,
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
    return Pair(theirs, theirs, ours)


def lightning_attention(block: int) -> Pair:
    layers = 4
    config = MiniMaxConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_SIZE,
        num_hidden_layers=layers,
        block_size=block,
    )
    theirs = MiniMaxLightningAttention(config, 0).eval()
    weights = dict(theirs.named_parameters())
    fused = weights["qkv_proj.weight"].unflatten(0, (HEADS, 3, HEAD_SIZE))
    query, key, value = (part.flatten(0, 1) for part in fused.unbind(1))
    entry = {
        "type": "retention",
        "decay": "slopes",
        "decay_scale": 1 + 1e-5,
        "activation": "silu",
        "norm": "full",
        "gate": "sigmoid",
        "rotary": False,
    }
    ours = LoneMixer("retention", entry)
    _fill(
        ours,
        q_proj__weight=query,
        k_proj__weight=key,
        v_proj__weight=value,
        g_proj__weight=weights["output_gate.weight"],
        heads__scale=weights["norm.weight"],
        o_proj__weight=weights["out_proj.weight"],
    )
    # Cosines and sines are an argument that it does not use.
    return Pair(theirs, lambda x: theirs(x, (x, x), None)[0], ours)


def _fill(ours: LoneMixer, **weights: Tensor) -> None:
    """Sets all weights but the input's norm; `__` stands for the dot in names."""
    norm = {"input_norm.weight": ours.mixer.get_parameter("input_norm.weight")}
    named = {name.replace("__", "."): weight.detach() for name, weight in weights.items()}
    ours.mixer.load_state_dict(norm | named)


MAMBA = "Mamba"
PEERS: Mapping[str, Callable[[], Pair]] = {
    MAMBA: mamba,
    "Mamba2": mamba2,
    "Qwen3-Next gated delta rule": gated_delta_rule,
    **{
        f"MiniMax lightning attention, blocks of {block}": partial(lightning_attention, block) for block in (CHUNK, 256)
    },
}
