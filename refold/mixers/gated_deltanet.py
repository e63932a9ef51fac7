"""Gated DeltaNet: a recurrent mixer whose state erases the old value of a key before it writes the new value."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from refold.families.arch import ArchSpec
from refold.mixers.heads import ConvolvedSpec
from refold.mixers.spec import Shape


class GatedDeltanet(ConvolvedSpec):
    """Replaces attention by Gated DeltaNet (arXiv 2412.06464)."""

    url = "https://arxiv.org/abs/2412.06464"
    former_names: ClassVar[Mapping[str, str]] = {
        "decay.a_log": "A_log",
        "decay.dt_bias": "dt_bias",
        "conv": "conv1d",
        "beta_proj": "b_proj",
        "decay_proj": "a_proj",
    }

    type: Literal["gated_deltanet"] = "gated_deltanet"
    decay: bool = True
    """Whether the state decays, with one factor for each token and head; false: DeltaNet (arXiv 2406.06484)."""
    rotary: bool = False
    """Whether queries and keys are rotated by the source's rotary embedding."""
    norm: Literal["head", "none"] = "head"
    """Root-mean-square norm of each head's output, with weights that all heads share."""
    gate: Literal["silu", "none"] = "silu"
    """Gate on the normed output, computed by its own projection."""

    @property
    def is_rotary(self) -> bool:
        return self.rotary

    def linears(self, arch: ArchSpec) -> dict[str, tuple[int, int]]:
        """Returns the projections. `b_proj` computes the write strength beta, `a_proj` the decay alpha."""
        layout = self.layout
        found = super().linears(arch) | {"b_proj": (layout.heads, arch.hidden_size)}
        if self.decay:
            found["a_proj"] = (layout.heads, arch.hidden_size)
        if self.gate != "none":
            found["g_proj"] = (layout.value_width, arch.hidden_size)
        return found

    def vectors(self, arch: ArchSpec) -> dict[str, Shape]:
        layout, found = self.layout, super().vectors(arch)
        if self.decay:
            found |= {"A_log": (layout.heads,), "dt_bias": (layout.heads,)}
        if self.conv:
            found["conv1d.weight"] = (layout.read_width, self.conv)
        if self.norm == "head":
            found["heads.scale"] = (layout.value_dim,)
        return found

    def flops_per_token(self, arch: ArchSpec) -> int:
        # Decay, read by the key, write, and read by the query; then the convolution.
        return 7 * self.layout.state_size + self.convolution_flops()
