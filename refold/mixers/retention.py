"""Retention: a state that fades at a fixed rate for each head; lightning attention is a setting of it."""

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
    """How fast head h of H forgets: `retnet`: 1 - 2^(-5-h) is kept for each token; `slopes`: exp(-2^(-8(h+1)/H)), as in
    lightning attention."""
    decay_scale: Annotated[Real, Field(gt=0)] = 1.0
    """Factor on the decays' logarithms; lightning attention lets it fall from layer to layer."""
    rotary: bool = True
    """Whether queries and keys are turned by the source's rotary embedding."""
    activation: Literal["none", "silu"] = "none"
    """On queries, keys and values; lightning attention has `silu`."""
    norm: Literal["head", "full", "none"] = "head"
    """Root-mean-square norm of the output: of each head without weights (the paper's group norm), or of all heads at
    once with weights (lightning attention)."""
    gate: Literal["silu", "sigmoid", "none"] = "silu"
    """Gate on the normed output, from a projection of its own."""

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
