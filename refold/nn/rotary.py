"""Rotary position embedding (arXiv 2104.09864), in the half-split layout of transformers."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from refold.families.arch import Rope

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, each `[B, T, 1, rotary_dim]`; the first half of the sines is negated."""


def inverse_frequencies(rope: Rope, max_positions: int) -> tuple[Float[Tensor, " half"], float]:
    """Returns the inverse frequencies of a rope kind, and the factor its cosines and sines are scaled by.

    For kind `dynamic` these are the frequencies of texts with at most `max_positions` tokens.
    """
    if rope.kind in ("default", "dynamic"):
        return 1.0 / rope.theta ** _exponents(rope), 1.0
    parameters = {"rope_type": rope.kind, "rope_theta": rope.theta, **rope.scaling}
    config = PreTrainedConfig()
    # transformers' formulas for the other kinds read these names off a config.
    config.head_dim = rope.rotary_dim
    config.hidden_size, config.num_attention_heads = rope.rotary_dim, 1
    config.max_position_embeddings = max_positions
    config.rope_parameters = parameters
    # Models are built on the meta device, where those formulas cannot compute.
    with torch.device("cpu"):
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"))
    return frequencies, factor


def stretched_frequencies(rope: Rope, max_positions: int, length: Int[Tensor, ""]) -> Float[Tensor, " half"]:
    """Returns the inverse frequencies of kind `dynamic` for a text of `length` tokens.

    Past L = `max_positions` the base grows with it: theta (factor length / L - (factor - 1))^(d / (d - 2)), with d the
    rotated dimensions. The result depends on the length alone, not, as in transformers, on longer texts seen before.
    """
    factor, size = rope.scaling["factor"], rope.rotary_dim
    grown = factor * length.clamp(min=max_positions) / max_positions - (factor - 1)
    return 1.0 / (rope.theta * grown ** (size / (size - 2))) ** _exponents(rope).to(length.device)


def _exponents(rope: Rope) -> Float[Tensor, " half"]:
    return torch.arange(0, rope.rotary_dim, 2, dtype=torch.float) / rope.rotary_dim


class Rotary(nn.Module):
    """Cosines and sines for one rope description."""

    inv_freq: Tensor

    def __init__(self, rope: Rope, max_positions: int):
        super().__init__()
        self.rope, self.max_positions = rope, max_positions
        frequencies, self.factor = inverse_frequencies(rope, max_positions)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def reset(self) -> None:
        """Computes the buffer anew (loading on the meta device leaves it undefined)."""
        frequencies, _ = inverse_frequencies(self.rope, self.max_positions)
        with torch.no_grad():
            self.inv_freq.copy_(frequencies)

    @torch.no_grad()
    def forward(self, positions: Int[Tensor, "B T"], dtype: torch.dtype) -> Rotation:
        """Returns cosines and sines in `dtype`, in float32 for `float32_turn`; angles are computed in float32."""
        frequencies = self.inv_freq.float()
        if self.rope.kind == "dynamic":
            frequencies = stretched_frequencies(self.rope, self.max_positions, positions.max() + 1)
        angles = (positions[..., None].float() * frequencies).unsqueeze(2)
        cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
        dtype = torch.float32 if self.rope.float32_turn else dtype
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Float[Tensor, "B T H K"], rotation: Rotation) -> Float[Tensor, "B T H K"]:
    """Rotates pairs (i, i + rotary_dim / 2) of the first `rotary_dim` dimensions of each head."""
    cos, sin = rotation
    size = cos.shape[-1]
    if size == x.shape[-1]:
        return (x * cos + x.roll(size // 2, dims=-1) * sin).to(x.dtype)
    turned = x[..., :size]
    turned = (turned * cos + turned.roll(size // 2, dims=-1) * sin).to(x.dtype)
    return torch.cat((turned, x[..., size:]), dim=-1)


def rotate_at_once(x: Float[Tensor, "B T H K"], rotation: Rotation) -> Float[Tensor, "B T H K"]:
    """Rotates like `rotate`, in fewer operations and with one rounding less; for inference."""
    cos, sin = rotation
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat((rotate_at_once(x[..., :size], rotation), x[..., size:]), dim=-1)
    turned = (x * cos).addcmul_(x.roll(size // 2, dims=-1), sin)
    return turned if turned.dtype == x.dtype else turned.to(x.dtype)
