"""What a stored part consists of, whatever it computes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from refold.families.arch import ArchSpec, Norm

Shape = tuple[int, ...]


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


def norm_vectors(name: str, norm: Norm, size: int) -> dict[str, Shape]:
    """The vectors of one norm over `size` numbers."""
    return {f"{name}.weight": (size,), **({f"{name}.bias": (size,)} if norm.bias else {})}
