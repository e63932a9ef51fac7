"""Mamba-2: a state-space model with one decay for each head and token (state space duality)."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from refold.families.arch import ArchSpec
from refold.mixers.heads import ConvolvedSpec
from refold.mixers.spec import Shape


class Mamba2(ConvolvedSpec):
    """Replaces attention by Mamba-2 (arXiv 2405.21060).

    Queries, keys and values are C, B and x of the paper, the mapping of Mamba in the Llama (arXiv 2408.15237).
    """

    url = "https://arxiv.org/abs/2405.21060"
    former_names: ClassVar[Mapping[str, str]] = {
        "decay.a_log": "A_log",
        "decay.dt_bias": "dt_bias",
        "skip.d": "D",
        "conv": "conv1d",
    }

    type: Literal["mamba2"] = "mamba2"
    norm: Literal["group", "none"] = "group"
    """Root-mean-square norm of the gated output, over all heads that share a query head."""
    gate: Literal["silu", "none"] = "silu"
    """Gate on the output, computed by its own projection (z in the paper)."""

    def linears(self, arch: ArchSpec) -> dict[str, tuple[int, int]]:
        layout = self.layout
        found = super().linears(arch) | {"dt_proj": (layout.heads, arch.hidden_size)}
        if self.gate != "none":
            found["g_proj"] = (layout.value_width, arch.hidden_size)
        return found

    def vectors(self, arch: ArchSpec) -> dict[str, Shape]:
        layout, found = self.layout, super().vectors(arch)
        found |= {"A_log": (layout.heads,), "dt_bias": (layout.heads,), "D": (layout.heads,)}
        if self.conv:
            found |= {"conv1d.weight": (layout.read_width, self.conv), "conv1d.bias": (layout.read_width,)}
        if self.norm == "group":
            found["heads.scale"] = (layout.value_width,)
        return found

    def flops_per_token(self, arch: ArchSpec) -> int:
        return super().flops_per_token(arch) + self.convolution_flops()
