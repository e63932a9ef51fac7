"""What a stored part consists of, whatever it computes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from refold.families.arch import ArchSpec, Norm

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fill:
    """What a fresh vector holds; `refold.nn.fills` makes it.

    Attributes:
        kind: `constant` (`low`); `normal` (standard deviation `low`); `log_uniform`: log of uniform numbers between
            `low` and `high`; `log_range`: log of 1, 2, 3, ... along the last dimension; `softplus_inverse`: what
            softplus turns into numbers between `low` and `high`, uniform in their logarithm; `last_tap`: a convolution
            that passes on the current token; `identity`: the identity for each head, `low` times, and other directions
            as long beyond it; `orthogonal`: for each head orthogonal directions of Gaussian length; `cosine`: for each
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
    """How a tensor of a part is taken over from the source's layer.

    Attributes:
        canonical: The source's canonical tensor, such as `mixer.q_proj.weight`.
        group: What a recipe's `transfer` calls it, such as `q_proj`; empty: it is always taken over.
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


@dataclass(frozen=True)
class PartSpec:
    """One kind of part.

    Tensor names are relative to the part: `q_proj.weight`, `input_norm.weight`. Linears can be relaxed by LoRA and
    replaced by quantised ones; vectors (norms, biases) can be kept for each depth.
    """

    name: str
    url: str
    linears: Callable[[ArchSpec, Mapping[str, Any]], dict[str, tuple[int, int]]]
    """Linear name to `(out, in)`, in the order they are stored."""
    vectors: Callable[[ArchSpec, Mapping[str, Any]], dict[str, Shape]]
    """Vector name (`q_proj.bias`, `input_norm.weight`) to shape."""
    flops_per_token: Callable[[ArchSpec, Mapping[str, Any]], int] = lambda arch, options: 0
    """FLOPs for each token besides those of the linears."""
    flops_per_context_token: Callable[[ArchSpec, Mapping[str, Any]], int] = lambda arch, options: 0
    """FLOPs for each token and each token it looks back to."""
    cache_elements_per_token: Callable[[ArchSpec, Mapping[str, Any]], int] = lambda arch, options: 0
    """Cached numbers per token of context, in the model's dtype."""
    state_elements: Callable[[ArchSpec, Mapping[str, Any]], int] = lambda arch, options: 0
    """Recurrent state, in float32 numbers per sequence."""
    kept_elements: Callable[[ArchSpec, Mapping[str, Any]], int] = lambda arch, options: 0
    """Last inputs of convolutions and windows, in numbers of the model's dtype per sequence."""
    fills: Callable[[ArchSpec, Mapping[str, Any]], Mapping[str, Fill]] = lambda arch, options: {}
    """Fresh values of vectors that are neither norms (ones) nor biases of linears (zeros)."""
    carried: Callable[[ArchSpec, Mapping[str, Any]], Mapping[str, Carried]] | None = None
    """Tensor name to where it is taken from; what is not named is new. None: the source's own layout, one for one."""
    rotary: Callable[[Mapping[str, Any]], bool] = lambda options: True
    """Whether it turns queries and keys by the source's rotary embedding."""
    resolve: Callable[[ArchSpec, Mapping[str, Any], str], dict[str, Any]] = lambda arch, options, where: dict(options)
    """From a recipe's options to those of a blueprint, with what depends on the source filled in; the last argument is
    the recipe's key, for messages. Raises RecipeError where source and options do not go together."""
    key_value_names: frozenset[str] = frozenset()
    """Linears and norms that only make keys and values, which depths may read from one another; empty: it has none."""
    is_recurrent: bool = False
    """Whether it keeps a state of constant size instead of keys and values."""
    approximates_softmax: bool = False
    """Whether it stands for its source's softmax attention by feature maps, its only vectors that attention does not
    have. Its options say in `fit` what they are fitted to."""


def outer_norms(arch: ArchSpec) -> dict[str, Shape]:
    """The norms around a mixer or an MLP: before it, after it, or both."""
    found: dict[str, Shape] = {}
    for name, is_there in (("input_norm", arch.input_norms), ("output_norm", arch.output_norms)):
        if is_there:
            found |= norm_vectors(name, arch.norm, arch.hidden_size)
    return found


def norm_vectors(name: str, norm: Norm, size: int) -> dict[str, Shape]:
    """The vectors of one norm over `size` numbers."""
    return {f"{name}.weight": (size,), **({f"{name}.bias": (size,)} if norm.bias else {})}
