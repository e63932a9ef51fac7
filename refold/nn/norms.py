"""Root-mean-square norm and LayerNorm whose weights may come from a depth instead of the stored part."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refold.families.arch import Norm


class StackNorm(nn.Module):
    """A norm over the last dimension.

    `rms`: x / sqrt(mean(x^2) + eps) * (offset + weight) (arXiv 1910.07467); `layer`: LayerNorm (arXiv 1607.06450). The
    statistics are taken in float32 and the result is rounded where transformers rounds it (`float32_scale`), so that
    bfloat16 agrees too.

    Args:
        spec: Kind, epsilon, offset, rounding and whether there is a bias.
        size: Length of the last dimension.
        stored: Whether weight and bias live here; otherwise each call brings them.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, spec: Norm, size: int, stored: bool = True):
        super().__init__()
        self.kind, self.eps, self.offset, self.size = spec.kind, spec.eps, spec.offset, size
        self.float32_scale = spec.float32_scale
        self.register_parameter("weight", nn.Parameter(torch.full((size,), 1.0 - spec.offset)) if stored else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(size)) if stored and spec.bias else None)

    def reset(self) -> None:
        """Initialises weight and bias to a scale of one and a shift of zero, if the norm stores them."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.offset)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Float[Tensor, "*batch size"],
        weight: Float[Tensor, "*rows size"] | None = None,
        bias: Float[Tensor, "*rows size"] | None = None,
    ) -> Float[Tensor, "*batch size"]:
        """Normalises `x`, with the given weight and bias where the norm stores none.

        Args:
            x: Inputs, rows first.
            weight: `[size]`, or `[B, 1, size]` with one for each row.
            bias: Like the weight.
        """
        weight = self.weight if weight is None else weight
        assert weight is not None
        if weight.ndim > 1:
            weight, bias = _spread(weight, x), None if bias is None else _spread(bias, x)
            if self.kind == "layer":
                y = nn.functional.layer_norm(x, (self.size,), None, None, self.eps) * weight
                return y if bias is None else y + bias
        if self.kind == "layer":
            bias = self.bias if bias is None else bias
            return nn.functional.layer_norm(x, (self.size,), weight, bias, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.float32_scale:
            return (wide * (self.offset + weight.float())).to(x.dtype)
        return (weight + self.offset if self.offset else weight) * wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.size}, eps={self.eps}"


def _spread(rows: Float[Tensor, "B 1 size"], x: Tensor) -> Tensor:
    """Gives vectors of rows as many dimensions as `x` has."""
    return rows.view(len(rows), *[1] * (x.ndim - 2), rows.shape[-1])
