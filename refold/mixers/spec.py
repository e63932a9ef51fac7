"""The interface of stored parts (tensors, cost, transfer), and the MLP, the only part that is not a mixer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from refold.families.arch import ArchSpec, Norm
from refold.fields import Section

Shape = tuple[int, ...]
SoftmaxFit = Literal["none", "data_free", "calibration"]
"""Inputs for fitting feature maps: none (no fit), random hidden states, or calibration text."""


@dataclass(frozen=True)
class Fill:
    """The initial values of a fresh tensor, as data; `refold.nn.fills` generates them.

    Attributes:
        kind: `constant`: `low`. `normal`: standard deviation `low`. `log_uniform`: log of uniform numbers between `low`
            and `high`. `log_range`: log of 1, 2, 3, ... along the last dimension. `softplus_inverse`: inverse softplus
            of log-uniform numbers between `low` and `high`. `last_tap`: a convolution that returns the current token.
            `identity`: for each head `low` times the identity; columns beyond it are random and of the same length.
            `orthogonal`: for each head orthogonal directions of Gaussian length. `cosine`: for each head the discrete
            cosine transform.
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
        group: The name in a recipe's `transfer`, such as `q_proj`; empty: the tensor is always taken over.
        repeat: Number of times that each head of the source is repeated (grouped key-value heads).
        misfit: The reason why the tensor cannot be taken over; empty: it fits.
    """

    canonical: str
    group: str = ""
    repeat: int = 1
    misfit: str = ""


@dataclass(frozen=True)
class CacheCost:
    """Memory that grows with the context: `bytes_per_token` for at most `max_tokens` tokens (None: no limit)."""

    bytes_per_token: int
    max_tokens: int | None


class PartSpec(Section):
    """One kind of stored part. The fields of the class are its options.

    Tensor names are relative to the part: `q_proj.weight`, `input_norm.weight`. Linears can be relaxed by LoRA and can
    be quantised; a depth can have own vectors (norms, biases, decays). The name of a linear has no dot, because it is
    also the name of a module and of a LoRA pair, and tensor names are cut at the first dot.
    """

    url: ClassVar[str]
    """The paper."""

    def linears(self, arch: ArchSpec) -> dict[str, tuple[int, int]]:
        """Returns name and `(out, in)` of each linear, in storage order."""
        raise NotImplementedError

    def vectors(self, arch: ArchSpec) -> dict[str, Shape]:
        """Returns name (`q_proj.bias`, `input_norm.weight`, `A_log`) and shape of each vector."""
        raise NotImplementedError

    def fills(self, arch: ArchSpec) -> Mapping[str, Fill]:
        """Returns the initial values of fresh vectors that are neither norms (ones) nor biases of linears (zeros)."""
        return {}

    def flops_per_token(self, arch: ArchSpec) -> int:
        """Counts the FLOPs of one token, without those of the linears."""
        return 0


class MixerSpec(PartSpec):
    """A token mixer: its options in a recipe, and the properties that planning and conversion need."""

    key_value_names: ClassVar[frozenset[str]] = frozenset()
    """Linears and norms that only serve keys and values, which a depth may read from another; empty: no keys."""
    is_native: ClassVar[bool] = False
    """Whether the mixer is the source's own attention: the same tensors and the same function."""
    is_recurrent: ClassVar[bool] = False
    """Whether the mixer keeps a state of constant size instead of keys and values."""
    transfers_all: ClassVar[bool] = False
    """Default of `transfer` in a recipe: true: `all`; false: the output projection and the MLP."""
    foreign_names: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Tensor names of the reference implementation, each with the tensors here that it concatenates by rows. A tensor
    that is not listed has the same name in both."""
    former_names: ClassVar[Mapping[str, str]] = {}
    """Names of linears and vectors in folders of earlier versions, each with the present name."""

    type: str
    """Name of the mixer in recipes and blueprints."""

    def resolve(self, arch: ArchSpec, where: str) -> "MixerSpec":
        """Fills in every option that depends on the source. A resolved mixer returns an equal one.

        Args:
            arch: The source.
            where: The recipe's key, for messages.

        Raises:
            RecipeError: The options do not fit the source.
        """
        return self

    def looks_back(self, source_window: int | None) -> int | None:
        """Returns the window in tokens, given the source's window; None: all tokens, or a recurrent state."""
        return None

    @property
    def is_rotary(self) -> bool:
        """Whether the mixer rotates queries and keys by the source's rotary embedding."""
        return True

    @property
    def softmax_fit(self) -> SoftmaxFit | None:
        """The inputs for fitting the feature maps to the source's softmax attention; None: no feature maps.

        A mixer with feature maps has no other vectors besides those of attention.
        """
        return None

    def carried(self, arch: ArchSpec) -> Mapping[str, Carried]:
        """Returns the source tensor for each tensor of the mixer; a tensor without an entry is fresh."""
        raise NotImplementedError

    def flops_per_context_token(self, arch: ArchSpec) -> int:
        """Counts the FLOPs of one token for each visible token."""
        return 0

    def cache_elements_per_token(self, arch: ArchSpec) -> int:
        """Counts the cached numbers per token of context, in the model's dtype."""
        return 0

    def state_elements(self, arch: ArchSpec) -> int:
        """Counts the float32 numbers of the recurrent state of one sequence."""
        return 0

    def kept_elements(self, arch: ArchSpec) -> int:
        """Counts the kept inputs of convolutions and windows of one sequence, in numbers of the model's dtype."""
        return 0

    @classmethod
    def current_name(cls, local: str) -> str:
        """Returns the present name of a tensor, given its present name or its name in an earlier version."""
        for former, current in cls.former_names.items():
            if local == former or local.startswith(f"{former}."):
                return current + local[len(former) :]
        return local


def outer_norms(arch: ArchSpec) -> dict[str, Shape]:
    """Returns the vectors of the norms before and after a mixer or an MLP."""
    found: dict[str, Shape] = {}
    for name, is_there in (("input_norm", arch.input_norms), ("output_norm", arch.output_norms)):
        if is_there:
            found |= norm_vectors(name, arch.norm, arch.hidden_size)
    return found


def norm_vectors(name: str, norm: Norm, size: int) -> dict[str, Shape]:
    """Returns name and shape of the vectors of one norm over `size` numbers."""
    return {f"{name}.weight": (size,), **({f"{name}.bias": (size,)} if norm.bias else {})}


class MlpSpec(PartSpec):
    """The source's MLP, which has no options."""

    url = "https://arxiv.org/abs/2002.05202"

    def linears(self, arch: ArchSpec) -> dict[str, tuple[int, int]]:
        up = (arch.intermediate_size, arch.hidden_size)
        return {
            **({"gate_proj": up} if arch.gated_mlp else {}),
            "up_proj": up,
            "down_proj": (arch.hidden_size, arch.intermediate_size),
        }

    def vectors(self, arch: ArchSpec) -> dict[str, Shape]:
        found = outer_norms(arch)
        if arch.mlp_bias:
            found |= {f"{name}.bias": (shape[0],) for name, shape in self.linears(arch).items()}
        return found


MLP = MlpSpec()
