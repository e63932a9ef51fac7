"""Base classes of recurrent mixers with heads: head counts, head sizes, and the source projections that fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from refold.errors import RecipeError
from refold.families.arch import ArchSpec
from refold.fields import Count, LayerIndex
from refold.mixers.attention import attention_biases
from refold.mixers.spec import Carried, Fill, MixerSpec, Shape, outer_norms

FILLS: Mapping[str, Fill] = {
    "A_log": Fill("log_uniform", 1.0, 16.0),
    "dt_bias": Fill("softplus_inverse", 0.001, 0.1),
    "D": Fill("constant", 1.0),
    "conv1d.weight": Fill("last_tap"),
    "conv1d.bias": Fill("constant", 0.0),
    "heads.scale": Fill("constant", 1.0),
}
"""The initial values of vectors that attention does not have."""


@dataclass(frozen=True)
class HeadLayout:
    """Numbers and sizes of the heads of queries, keys and values."""

    heads: int
    q_heads: int
    k_heads: int
    v_heads: int
    key_dim: int
    value_dim: int

    @property
    def value_width(self) -> int:
        """Width of the output: all heads together."""
        return self.heads * self.value_dim

    @property
    def read_width(self) -> int:
        """Width of the projected queries, keys and values together."""
        return (self.q_heads + self.k_heads) * self.key_dim + self.v_heads * self.value_dim

    @property
    def state_size(self) -> int:
        """Count of numbers in the state of one sequence."""
        return self.heads * self.key_dim * self.value_dim


class HeadedSpec(MixerSpec):
    """A recurrent mixer with queries, keys and values in heads."""

    is_recurrent: ClassVar[bool] = True

    heads: Count | None = None
    """Number of state heads. Default: the number of query heads of the source."""
    q_heads: Count | None = None
    """Number of query heads, each shared by a group of state heads. Default: the number of state heads."""
    k_heads: Count | None = None
    """Number of key heads. Default: the number of state heads, so that grouped key heads of a source are repeated."""
    v_heads: Count | None = None
    """Number of value heads. Default: the number of state heads."""
    key_dim: Count | None = None
    """Size of a query head and of a key head. Default: the source's attention width divided by `heads`."""
    value_dim: Count | None = None
    """Size of a value head. Default: the source's attention width divided by `heads`."""
    norm: str
    """Norm of the output."""
    gate: str
    """Gate on the output."""

    @property
    def layout(self) -> HeadLayout:
        """The head counts and sizes of a resolved mixer."""
        sizes = {name: getattr(self, name) for name in HeadLayout.__dataclass_fields__}
        assert None not in sizes.values(), f"{self.type}: only a resolved mixer has a layout"
        return HeadLayout(**sizes)

    @property
    def is_rotary(self) -> bool:
        return False

    @property
    def conv_width(self) -> int:
        """Width of the short convolution on queries, keys and values; 0: none."""
        return 0

    @property
    def conv_function(self) -> str:
        """Activation after the convolution."""
        return "none"

    @property
    def input_activation(self) -> str:
        """Activation of queries, keys and values."""
        return "none"

    def resolve(self, arch: ArchSpec, where: str) -> "HeadedSpec":
        """Fills in head counts and sizes.

        Raises:
            RecipeError: A count does not divide the heads, a size does not follow from the source, or heads are too
                small for the rotary embedding.
        """
        width = arch.num_attention_heads * arch.head_dim
        heads = self.heads or arch.num_attention_heads
        found = {"heads": heads}
        for name in ("q_heads", "k_heads", "v_heads"):
            found[name] = getattr(self, name) or heads
            if heads % found[name]:
                raise RecipeError(f"{where}.{name}: must divide the {heads} heads of the state (got {found[name]})")
        for name in ("key_dim", "value_dim"):
            given = getattr(self, name)
            if given is None and width % heads:
                raise RecipeError(
                    f"{where}.{name}: required where {heads} heads do not divide the source's width {width}"
                )
            found[name] = given or width // heads
        turned = max((layer.rope.rotary_dim for layer in arch.layers if layer.rope), default=0)
        if self.is_rotary and found["key_dim"] < turned:
            raise RecipeError(
                f"{where}.rotary: must be false where key heads are smaller than the source's rotary embedding "
                f"(got heads of {found['key_dim']}, and {turned} dimensions to rotate)"
            )
        return self.model_copy(update=found)

    def linears(self, arch: ArchSpec) -> dict[str, tuple[int, int]]:
        """Returns `q_proj`, `k_proj`, `v_proj` and `o_proj`."""
        layout, hidden = self.layout, arch.hidden_size
        return {
            "q_proj": (layout.q_heads * layout.key_dim, hidden),
            "k_proj": (layout.k_heads * layout.key_dim, hidden),
            "v_proj": (layout.v_heads * layout.value_dim, hidden),
            "o_proj": (hidden, layout.value_width),
        }

    def vectors(self, arch: ArchSpec) -> dict[str, Shape]:
        """Returns the norms around the mixer, and the biases that the source's attention has."""
        return outer_norms(arch) | attention_biases(arch, self.linears(arch))

    def fills(self, arch: ArchSpec) -> Mapping[str, Fill]:
        vectors = self.vectors(arch)
        return {name: fill for name, fill in FILLS.items() if name in vectors}

    def flops_per_token(self, arch: ArchSpec) -> int:
        # For each number of the state: a multiplication to decay, a multiply-add to write, a multiply-add to read.
        return 5 * self.layout.state_size

    def state_elements(self, arch: ArchSpec) -> int:
        return self.layout.state_size

    def carried(self, arch: ArchSpec) -> Mapping[str, Carried]:
        """Returns the source projections for this mixer, each with the reason if it does not fit."""
        layout, vectors = self.layout, self.vectors(arch)
        query = arch.num_attention_heads, arch.head_dim
        grouped = arch.num_key_value_heads, arch.head_dim
        found = {
            "q_proj": _carry_rows("q_proj", query, (layout.q_heads, layout.key_dim)),
            "k_proj": _carry_rows("k_proj", grouped, (layout.k_heads, layout.key_dim)),
            "v_proj": _carry_rows("v_proj", grouped, (layout.v_heads, layout.value_dim)),
            "o_proj": carry_output(arch, layout.value_width),
        }
        carried = carried_norms(arch)
        for name, each in found.items():
            carried[f"{name}.weight"] = each
            if f"{name}.bias" in vectors:
                carried[f"{name}.bias"] = Carried(f"mixer.{name}.bias", name, each.repeat, each.misfit)
        return carried


class ConvolvedSpec(HeadedSpec):
    """A mixer with heads, a short convolution on queries, keys and values, and decays that depend on the token."""

    conv: LayerIndex = 4
    """Width of the short convolution on queries, keys and values; 0: none."""
    conv_activation: Literal["silu", "none"] = "silu"
    """Activation after the convolution."""

    @property
    def conv_width(self) -> int:
        return self.conv

    @property
    def conv_function(self) -> str:
        return self.conv_activation

    def convolution_flops(self) -> int:
        """Counts the FLOPs of the convolution for each token."""
        return 2 * self.conv * self.layout.read_width

    def kept_elements(self, arch: ArchSpec) -> int:
        return max(self.conv - 1, 0) * self.layout.read_width


def carried_norms(arch: ArchSpec) -> dict[str, Carried]:
    """Returns the norms around a mixer, which every mixer takes over from the source."""
    return {name: Carried(f"mixer.{name}") for name in outer_norms(arch)}


def carry_output(arch: ArchSpec, width: int) -> Carried:
    """Returns the source's output projection, which fits if `width` equals the source's attention width."""
    source = arch.num_attention_heads * arch.head_dim
    misfit = "" if width == source else f"the source's is {source} wide, this mixer's {width}"
    return Carried("mixer.o_proj.weight", "o_proj", misfit=misfit)


def _carry_rows(name: str, source: tuple[int, int], target: tuple[int, int]) -> Carried:
    canonical = f"mixer.{name}.weight"
    if target[1] != source[1] or target[0] % source[0]:
        misfit = f"the source has {source[0]} heads of {source[1]}, this mixer {target[0]} of {target[1]}"
        return Carried(canonical, name, misfit=misfit)
    return Carried(canonical, name, repeat=target[0] // source[0])
