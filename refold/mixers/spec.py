"""The base classes of parts: what a mixer or an MLP stores, costs and takes over from its source."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from refold.families.arch import ArchSpec, Norm
from refold.fields import Section

Shape = tuple[int, ...]
SoftmaxFit = Literal["none", "data_free", "calibration"]
"""Inputs that feature maps are fitted on: none, random ones, or calibration text."""


@dataclass(frozen=True)
class Fill:
    """The initial values of a fresh vector; `refold.nn.fills` makes them.

    Attributes:
        kind: `constant` (`low`); `normal` (standard deviation `low`); `log_uniform`: log of uniform numbers between
            `low` and `high`; `log_range`: log of 1, 2, 3, ... along the last dimension; `softplus_inverse`: the inverse
            softplus of numbers between `low` and `high`, uniform in their logarithm; `last_tap`: a convolution that
            passes on the current token; `identity`: the identity for each head, `low` times, and other directions as
            long beyond it; `orthogonal`: for each head orthogonal directions of Gaussian length; `cosine`: for each
            head the discrete cosine transform.
    """

    kind: Literal[
        "constant",
        "normal",
        "log_uniform",
        "log_range",
        "softplus_inverse",
        "last_tap",
        "identity",
        "orthogonal",
        "cosine",
    ]
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Carried:
    """The source tensor that a tensor of a part is taken over from.

    Attributes:
        canonical: The source's canonical tensor, such as `mixer.q_proj.weight`.
        group: Its name in a recipe's `transfer`, such as `q_proj`; empty: it is always taken over.
        repeat: How often each of the source's heads stands in it (key-value heads for more heads).
        misfit: Why it cannot be taken over; empty where it can.
    """

    canonical: str
    group: str = ""
    repeat: int = 1
    misfit: str = ""


@dataclass(frozen=True)
class CacheCost:
    """Memory that grows with the context: `bytes_per_token` for at most `max_tokens` tokens (None: without end)."""

    bytes_per_token: int
    max_tokens: int | None


class PartSpec(Section):
    """One kind of stored part; its fields are its options.

    Tensor names are relative to the part: `q_proj.weight`, `input_norm.weight`. Linears can be relaxed by LoRA and
    replaced by quantised ones; vectors (norms, biases, decays) can be kept for each depth. The name of a linear has no
    dot: it is the name of a module, of a LoRA pair, and the part of a tensor's name before the first dot.
    """

    url: ClassVar[str]
    """The paper."""

    def linears(self, arch: ArchSpec) -> dict[str, tuple[int, int]]:
        """Returns linear name to `(out, in)`, in the order they are stored."""
        raise NotImplementedError

    def vectors(self, arch: ArchSpec) -> dict[str, Shape]:
        """Returns vector name (`q_proj.bias`, `input_norm.weight`, `A_log`) to shape."""
        raise NotImplementedError

    def fills(self, arch: ArchSpec) -> Mapping[str, Fill]:
        """Returns the initial values of fresh vectors that are neither norms (ones) nor biases of linears (zeros)."""
        return {}

    def flops_per_token(self, arch: ArchSpec) -> int:
        """Counts the FLOPs for each token besides those of the linears."""
        return 0


class MixerSpec(PartSpec):
    """A token mixer: the options of a recipe's section, and all that planning and conversion ask about it."""

    key_value_names: ClassVar[frozenset[str]] = frozenset()
    """Linears and norms that only make keys and values, which depths may read from one another; empty: it has none."""
    is_native: ClassVar[bool] = False
    """Whether it is the source's own attention: the same tensors, one for one, and the same function of them."""
    is_recurrent: ClassVar[bool] = False
    """Whether it keeps a state of constant size instead of keys and values."""
    transfers_all: ClassVar[bool] = False
    """Whether a recipe that names no `transfer` takes over everything, instead of the output projection and the MLP."""
    foreign_names: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Tensor names of the reference implementation to the tensors here that it consists of, one below the other. A
    tensor that is not listed has the same name in both."""
    former_names: ClassVar[Mapping[str, str]] = {}
    """Names that folders written by earlier versions give to linears and vectors, each with its name now."""

    type: str
    """Which mixer."""

    def resolve(self, arch: ArchSpec, where: str) -> "MixerSpec":
        """Returns the mixer with every option filled in that depends on the source; a resolved one gives itself.

        Args:
            arch: The source.
            where: The recipe's key, for messages.

        Raises:
            RecipeError: Source and options do not go together.
        """
        return self

    def looks_back(self, source_window: int | None) -> int | None:
        """Returns the window of its depths in tokens, given the source's; None: all tokens, or a state holds them."""
        return None

    @property
    def is_rotary(self) -> bool:
        """Whether it turns queries and keys by the source's rotary embedding."""
        return True

    @property
    def softmax_fit(self) -> SoftmaxFit | None:
        """The inputs on which its feature maps are fitted to the source's softmax attention.

        The maps are its only vectors that attention does not have. None: it does not stand for softmax attention.
        """
        return None

    def carried(self, arch: ArchSpec) -> Mapping[str, Carried]:
        """Returns tensor name to the source tensor it is taken from; a tensor without an entry starts fresh."""
        raise NotImplementedError

    def flops_per_context_token(self, arch: ArchSpec) -> int:
        """Counts the FLOPs for each token and each token it looks back to."""
        return 0

    def cache_elements_per_token(self, arch: ArchSpec) -> int:
        """Counts the cached numbers per token of context, in the model's dtype."""
        return 0

    def state_elements(self, arch: ArchSpec) -> int:
        """Counts the float32 numbers of the recurrent state of one sequence."""
        return 0

    def kept_elements(self, arch: ArchSpec) -> int:
        """Counts the last inputs of convolutions and windows, in numbers of the model's dtype per sequence."""
        return 0

    @classmethod
    def current_name(cls, local: str) -> str:
        """Returns the name of one of its tensors, given the name in this version or an earlier one."""
        for former, current in cls.former_names.items():
            if local == former or local.startswith(f"{former}."):
                return current + local[len(former) :]
        return local


def outer_norms(arch: ArchSpec) -> dict[str, Shape]:
    """Returns the norms around a mixer or an MLP: before it, after it, or both."""
    found: dict[str, Shape] = {}
    for name, is_there in (("input_norm", arch.input_norms), ("output_norm", arch.output_norms)):
        if is_there:
            found |= norm_vectors(name, arch.norm, arch.hidden_size)
    return found


def norm_vectors(name: str, norm: Norm, size: int) -> dict[str, Shape]:
    """Returns the vectors of one norm over `size` numbers."""
    return {f"{name}.weight": (size,), **({f"{name}.bias": (size,)} if norm.bias else {})}
