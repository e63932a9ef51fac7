"""Retention: a recurrent mixer with one fixed decay for each head. Lightning attention is a special case."""

from typing import Annotated, Literal

from pydantic import Field

from refold.families.arch import ArchSpec
from refold.fields import Real
from refold.mixers.heads import HeadedSpec
from refold.mixers.spec import Shape


class Retention(HeadedSpec):
    """Replaces attention by retention (arXiv 2307.08621)."""

    url = "https://arxiv.org/abs/2307.08621"

    type: Literal["retention"] = "retention"
    decay: Literal["retnet", "slopes"] = "retnet"
    """Factor on the state of head h of H for each token. `retnet`: 1 - 2^(-5-h); `slopes`: exp(-2^(-8(h+1)/H)), as in
    lightning attention."""
    decay_scale: Annotated[Real, Field(gt=0)] = 1.0
    """Factor on the logarithm of the decays. In lightning attention it falls from layer to layer."""
    rotary: bool = True
    """Whether queries and keys are rotated by the source's rotary embedding."""
    activation: Literal["none", "silu"] = "none"
    """Activation of queries, keys and values. Lightning attention uses `silu`."""
    norm: Literal["head", "full", "none"] = "head"
    """Root-mean-square norm of the output: of each head without weights (`head`, the group norm of the paper), or of
    all heads at once with weights (`full`, lightning attention)."""
    gate: Literal["silu", "sigmoid", "none"] = "silu"
    """Gate on the normed output, computed by its own projection."""

    @property
    def is_rotary(self) -> bool:
        return self.rotary

    @property
    def input_activation(self) -> str:
        return self.activation

    def linears(self, arch: ArchSpec) -> dict[str, tuple[int, int]]:
        gate = {} if self.gate == "none" else {"g_proj": (self.layout.value_width, arch.hidden_size)}
        return super().linears(arch) | gate

    def vectors(self, arch: ArchSpec) -> dict[str, Shape]:
        scale = {"heads.scale": (self.layout.value_width,)} if self.norm == "full" else {}
        return super().vectors(arch) | scale
