"""Linears stored as two low-rank factors, and linears of which only the first factor (a basis) is stored."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class FactoredLinear(nn.Module):
    """y = B (A x) + bias, with A `[rank, in]` and B `[out, rank]`; rank 0 stores no factor and gives the bias alone.

    The factors are plain `nn.Linear`s, so that tools that replace linears by name find them too.

    Args:
        linear: The linear whose place it takes; its bias is taken over.
        rank: Of the factors.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.in_features, self.out_features, self.rank = linear.in_features, linear.out_features, rank
        self.a = nn.Linear(linear.in_features, rank, bias=False) if rank else None
        self.b = nn.Linear(rank, linear.out_features, bias=False) if rank else None
        self.register_parameter("bias", linear.bias)
        if self.a is not None:
            _fill_first(self.a)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.a is None or self.b is None:
            y = x.new_zeros(*x.shape[:-1], self.out_features)
        else:
            y = self.b(self.a(x))
        return y if self.bias is None else y + self.bias

    def reset(self) -> None:
        """Initialises the bias; factors are linears of their own."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, in={self.in_features}, out={self.out_features}"


class BasisLinear(nn.Module):
    """y = B (A x) + bias with A `[rank, in]` stored here and B `[out, rank]` given with each call.

    Several depths share the basis A, and each has coefficients B of its own (Basis Sharing, arXiv 2410.03765).

    Args:
        linear: The linear whose place it takes; its bias is taken over.
        rank: Of the basis.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.in_features, self.out_features, self.rank = linear.in_features, linear.out_features, rank
        self.a = nn.Linear(linear.in_features, rank, bias=False)
        self.register_parameter("bias", linear.bias)
        _fill_first(self.a)

    def forward(
        self, x: Float[Tensor, "*batch in"], coefficients: Tensor | Sequence[tuple[slice, Tensor]]
    ) -> Float[Tensor, "*batch out"]:
        """Projects onto the basis and multiplies by coefficients.

        Args:
            x: Inputs.
            coefficients: `[out, rank]`; or several of those, each with the rows of the batch it belongs to, in order.
        """
        low = self.a(x)
        # Coefficients that are stored as integers are dequantised to float32.
        if isinstance(coefficients, Tensor):
            return nn.functional.linear(low, coefficients.to(low.dtype), self.bias)
        groups = [(rows, own.to(low.dtype)) for rows, own in coefficients]
        return torch.cat([nn.functional.linear(low[rows], own, self.bias) for rows, own in groups])

    def reset(self) -> None:
        """Initialises the bias; factors are linears of their own."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, in={self.in_features}, out={self.out_features}"


def _fill_first(a: nn.Linear) -> None:
    """Initialises A with standard deviation rank^(-1/2): entries of B A then vary as much as those of B."""
    nn.init.normal_(a.weight, std=a.out_features**-0.5)
    # transformers would fill it like other linears, and calls no `reset` of a module without own parameters.
    a.weight._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
