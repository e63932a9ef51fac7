"""Mamba: a selective state-space model with one decay for each channel and state dimension."""

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

from refold.families.arch import ArchSpec
from refold.fields import Count
from refold.mixers.heads import carried_norms, carry_output
from refold.mixers.spec import Carried, Fill, MixerSpec, Shape, outer_norms


class MambaSizes(NamedTuple):
    """Sizes of a resolved Mamba: inner channels, state dimensions for each channel, and the rank of the step sizes."""

    width: int
    state: int
    dt_rank: int


class Mamba(MixerSpec):
    """Replaces attention by Mamba (arXiv 2312.00752)."""

    url = "https://arxiv.org/abs/2312.00752"
    is_recurrent = True
    # Two linears instead of one `in_proj`: x is taken over from the source's values, z is fresh.
    foreign_names: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "in_proj.weight": ("in_proj_x.weight", "in_proj_z.weight")
    }
    former_names: ClassVar[Mapping[str, str]] = {
        "v_proj": "in_proj_x",
        "g_proj": "in_proj_z",
        "select_proj": "x_proj",
        "o_proj": "out_proj",
        "conv": "conv1d",
        "decay.a_log": "A_log",
        "skip.d": "D",
    }

    type: Literal["mamba"] = "mamba"
    width: Count | None = None
    """Number of inner channels. Default: twice the hidden size."""
    state: Count = 16
    """Number of state dimensions for each channel."""
    conv: Count = 4
    """Width of the short convolution."""
    dt_rank: Count | None = None
    """Rank of the projection for step sizes. Default: a sixteenth of the hidden size, rounded up."""

    @property
    def sizes(self) -> MambaSizes:
        """The sizes of a resolved mixer."""
        assert self.width is not None, "only a resolved mixer has sizes"
        assert self.dt_rank is not None, "only a resolved mixer has sizes"
        return MambaSizes(self.width, self.state, self.dt_rank)

    @property
    def is_rotary(self) -> bool:
        return False

    def resolve(self, arch: ArchSpec, where: str) -> "Mamba":
        """Fills in width and rank."""
        width, rank = self.width or 2 * arch.hidden_size, self.dt_rank or -(-arch.hidden_size // 16)
        return self.model_copy(update={"width": width, "dt_rank": rank})

    def linears(self, arch: ArchSpec) -> dict[str, tuple[int, int]]:
        width, state, rank = self.sizes
        return {
            "in_proj_x": (width, arch.hidden_size),
            "in_proj_z": (width, arch.hidden_size),
            "x_proj": (rank + 2 * state, width),
            "dt_proj": (width, rank),
            "out_proj": (arch.hidden_size, width),
        }

    def vectors(self, arch: ArchSpec) -> dict[str, Shape]:
        """Returns all vectors. `conv1d.weight` is stored without the middle axis of size one that `nn.Conv1d` has."""
        width, state, _ = self.sizes
        return outer_norms(arch) | {
            "dt_proj.bias": (width,),
            "A_log": (width, state),
            "D": (width,),
            "conv1d.weight": (width, self.conv),
            "conv1d.bias": (width,),
        }

    def fills(self, arch: ArchSpec) -> Mapping[str, Fill]:
        return {
            "dt_proj.bias": Fill("softplus_inverse", 0.001, 0.1),
            "A_log": Fill("log_range"),
            "D": Fill("constant", 1.0),
            "conv1d.weight": Fill("last_tap"),
            "conv1d.bias": Fill("constant", 0.0),
        }

    def carried(self, arch: ArchSpec) -> Mapping[str, Carried]:
        """Returns the source's value and output projections, which fit if `width` equals the source's width."""
        width, values = self.sizes.width, arch.num_key_value_heads * arch.head_dim
        repeat = width // values if width == arch.num_attention_heads * arch.head_dim else 1
        misfit = "" if width == repeat * values else f"the source's is {values} wide, this mixer's {width}"
        new = {
            name: Carried(f"mixer.{name}.weight", name, misfit="this mixer computes them from its values")
            for name in ("q_proj", "k_proj")
        }
        return carried_norms(arch) | {
            **{f"{name}.weight": each for name, each in new.items()},
            "in_proj_x.weight": Carried("mixer.v_proj.weight", "v_proj", repeat, misfit),
            "out_proj.weight": carry_output(arch, width),
        }

    def flops_per_token(self, arch: ArchSpec) -> int:
        width, state, _ = self.sizes
        return 7 * width * state + 2 * self.conv * width

    def state_elements(self, arch: ArchSpec) -> int:
        return self.sizes.width * self.state

    def kept_elements(self, arch: ArchSpec) -> int:
        return (self.conv - 1) * self.sizes.width
