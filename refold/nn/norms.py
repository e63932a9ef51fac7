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
    fused: "FusedNorm | None" = None

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
        if self.fused is not None:
            return self.fused(x, weight, bias)
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

    def fuse(self) -> "FusedNorm":
        """Lets all later calls run the norm in fewer operations; without gradients, and for weights as they are now."""
        self.fused = FusedNorm(self)
        return self.fused

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.size}, eps={self.eps}"


class FusedNorm:
    """A norm in few operations, for inference; equal to its `StackNorm` up to rounding, of which there is one.

    `rms` is x / sqrt(|x|^2 + size eps) times a prepared weight, sqrt(size) (offset + weight) in float32.

    Args:
        norm: The norm.
    """

    def __init__(self, norm: StackNorm):
        self.offset, self.eps, self.size = norm.offset, norm.eps, norm.size
        self._is_rms = norm.kind == "rms"
        self._weight = None if norm.weight is None else self.prepare(norm.weight)
        self._bias = None if norm.bias is None else norm.bias.detach()
        device = None if norm.weight is None else norm.weight.device
        self._least = torch.tensor((norm.size * norm.eps) ** 0.5, device=device)

    def prepare(self, weight: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
        """Returns a weight in the form that calls take."""
        weight = weight.detach()
        return (weight.float() + self.offset) * self.size**0.5 if self._is_rms else weight

    def __call__(
        self, x: Float[Tensor, "*batch size"], weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Float[Tensor, "*batch size"]:
        """Normalises `x`; arguments as for `StackNorm`, with a weight that `prepare` returned."""
        if weight is None:
            weight, bias = self._weight, self._bias
            assert weight is not None
        elif weight.ndim > 1:
            weight, bias = _spread(weight, x), None if bias is None else _spread(bias, x)
        if self._is_rms:
            wide = x.float()
            length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            return (wide / length.hypot_(self._least)).mul_(weight).to(x.dtype)
        if weight.ndim == 1:
            return nn.functional.layer_norm(x, (self.size,), weight, bias, self.eps)
        y = nn.functional.layer_norm(x, (self.size,), None, None, self.eps) * weight
        return y if bias is None else y + bias


def _spread(rows: Float[Tensor, "B 1 size"], x: Tensor) -> Tensor:
    """Gives vectors of rows as many dimensions as `x` has."""
    return rows.view(len(rows), *[1] * (x.ndim - 2), rows.shape[-1])
