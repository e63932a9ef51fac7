"""Makes the initial values of fresh vectors, from the fills of their mixers."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from refold.mixers.spec import Fill, Shape


def make_fill(fill: Fill, shape: Shape, generator: torch.Generator | None = None) -> Tensor:
    """Returns the initial values of a vector, in float32 on the CPU.

    Args:
        fill: The rule for the values, from the spec of the mixer.
        shape: Its shape; of maps `[heads, head_dim, directions]`, of convolutions `[channels, width]`.
        generator: For random values.
    """
    return _MAKERS[fill.kind](fill, shape, generator)


def _uniform(low: float, high: float, shape: Shape, generator: torch.Generator | None) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _softplus_inverse(fill: Fill, shape: Shape, generator: torch.Generator | None) -> Tensor:
    step = _uniform(math.log(fill.low), math.log(fill.high), shape, generator).exp()
    return step + torch.log(-torch.expm1(-step))


def _last_tap(fill: Fill, shape: Shape, generator: torch.Generator | None) -> Tensor:
    weight = torch.zeros(shape)
    weight[..., -1] = 1.0
    return weight


def _log_range(fill: Fill, shape: Shape, generator: torch.Generator | None) -> Tensor:
    return torch.arange(1, shape[-1] + 1, dtype=torch.float32).log().expand(shape).clone()


def _identity(fill: Fill, shape: Shape, generator: torch.Generator | None) -> Tensor:
    heads, size, directions = shape
    blocks = [torch.eye(size).expand(heads, size, size)]
    # Copies would get equal gradients and stay equal, so further directions are other orthonormal ones.
    for _ in range(-(-directions // size) - 1):
        blocks.append(_random_basis(heads, size, generator))
    return fill.low * torch.cat(blocks, dim=-1)[..., :directions]


def _orthogonal(fill: Fill, shape: Shape, generator: torch.Generator | None) -> Tensor:
    heads, size, directions = shape
    blocks = []
    for _ in range(-(-directions // size)):
        basis = _random_basis(heads, size, generator)
        lengths = torch.randn(heads, size, size, generator=generator).norm(dim=-1)
        blocks.append(basis * lengths.unsqueeze(1))
    return torch.cat(blocks, dim=-1)[..., :directions]


def _random_basis(heads: int, size: int, generator: torch.Generator | None) -> Float[Tensor, "H K K"]:
    """Draws orthonormal matrices uniformly (Haar): signs that make R's diagonal positive (arXiv math-ph/0609050)."""
    basis, triangle = torch.linalg.qr(torch.randn(heads, size, size, generator=generator))
    return basis * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def _cosine(fill: Fill, shape: Shape, generator: torch.Generator | None) -> Tensor:
    heads, size, directions = shape
    places, waves = torch.arange(size, dtype=torch.float32)[:, None] + 0.5, torch.arange(directions) % size
    # Each direction is as long as a Gaussian one is on average: the square root of the size, times an orthonormal one.
    basis = torch.cos(math.pi / size * places * waves) * torch.where(waves == 0, 1.0, math.sqrt(2.0))
    # Directions beyond the transform's own are the same with other signs, drawn at random.
    signs = torch.randint(0, 2, (heads, size, -(-directions // size)), generator=generator) * 2.0 - 1.0
    signs = signs.repeat_interleave(size, dim=-1)[..., :directions]
    return basis.expand(heads, size, directions) * signs


_MAKERS = {
    "constant": lambda fill, shape, generator: torch.full(shape, fill.low),
    "normal": lambda fill, shape, generator: fill.low * torch.randn(shape, generator=generator),
    "log_uniform": lambda fill, shape, generator: _uniform(fill.low, fill.high, shape, generator).log(),
    "log_range": _log_range,
    "softplus_inverse": _softplus_inverse,
    "last_tap": _last_tap,
    "identity": _identity,
    "orthogonal": _orthogonal,
    "cosine": _cosine,
}
