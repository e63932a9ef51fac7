"""Gated linear attention: a recurrent mixer with one decay for each key channel and token."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from refold.errors import RecipeError
from refold.families.arch import ArchSpec
from refold.fields import Count, Real
from refold.mixers.heads import HeadedSpec
from refold.mixers.spec import Shape


class Gla(HeadedSpec):
    """Replaces attention by gated linear attention (arXiv 2312.06635)."""

    url = "https://arxiv.org/abs/2312.06635"
    # flash-linear-attention keeps both factors in one `Sequential`; the name of a linear here has no dot.
    foreign_names: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "gk_proj.0.weight": ("gk_proj_down.weight",),
        "gk_proj.1.weight": ("gk_proj_up.weight",),
        "gk_proj.1.bias": ("gk_proj_up.bias",),
        "g_norm_swish_gate.weight": ("heads.scale",),
    }
    former_names: ClassVar[Mapping[str, str]] = {"decay_down_proj": "gk_proj_down", "decay_up_proj": "gk_proj_up"}

    type: Literal["gla"] = "gla"
    decay_from: Literal["projection", "keys"] = "projection"
    """Input of the decays: a low-rank projection of the hidden state, or the keys of each head, which needs no new
    weights (Liger, arXiv 2503.01496)."""
    decay_rank: Count = 16
    """Rank of the projection for decays."""
    decay_divisor: Annotated[Real, Field(gt=0)] = 16.0
    """Divisor of the log-sigmoid that gives the decays. A larger divisor forgets more slowly."""
    rotary: bool = False
    """Whether queries and keys are rotated by the source's rotary embedding."""
    activation: Literal["none", "softmax"] = "none"
    """Activation of queries and keys. Liger uses the softmax over the channels of a head."""
    norm: Literal["head", "none"] = "head"
    """Root-mean-square norm of each head's output, with weights that all heads share."""
    gate: Literal["silu", "none"] = "silu"
    """Gate on the normed output, computed by its own projection."""

    @property
    def is_rotary(self) -> bool:
        return self.rotary

    def resolve(self, arch: ArchSpec, where: str) -> "HeadedSpec":
        """Fills in head counts and sizes.

        Raises:
            RecipeError: As for every mixer with heads; or decays are computed from keys that are rotated.
        """
        if self.decay_from == "keys" and self.rotary:
            raise RecipeError(
                f"{where}.rotary: must be false where decay_from is keys, because it rotates the keys (got true)"
            )
        return super().resolve(arch, where)

    def linears(self, arch: ArchSpec) -> dict[str, tuple[int, int]]:
        layout, found = self.layout, super().linears(arch)
        if self.decay_from == "projection":
            found["gk_proj_down"] = (self.decay_rank, arch.hidden_size)
            found["gk_proj_up"] = (layout.heads * layout.key_dim, self.decay_rank)
        if self.gate != "none":
            found["g_proj"] = (layout.value_width, arch.hidden_size)
        return found

    def vectors(self, arch: ArchSpec) -> dict[str, Shape]:
        layout, found = self.layout, super().vectors(arch)
        if self.decay_from == "projection":
            found["gk_proj_up.bias"] = (layout.heads * layout.key_dim,)
        if self.norm == "head":
            found["heads.scale"] = (layout.value_dim,)
        return found
