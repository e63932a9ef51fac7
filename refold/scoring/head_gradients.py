"""Gradients of hidden states and head, added up over blocks of positions."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from refold.scoring.head import Head

_FLOAT32_SHARE = 0.15  # of the logits of one copy; the naive computation holds several
_TILE_BYTES = 32 * 2**20  # of the head's gradient, where a product must be rounded up before it is added


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool


class HeadGradients:
    """Sums of the gradients a loss has by hidden states and by a head's tensors.

    In half precision the head's gradient is summed in float32 where that is small beside a block or beside all logits,
    else in the weight's dtype.

    Args:
        hidden: of all positions `[M, D]`, in the dtype its gradient is to have.
        head: in the dtype its products run in.
        weight: the head's weight in the dtype it is stored in.
        needs: which of them to make.
        factor: on everything.
        block_bytes: float32 logits of one block.
    """

    def __init__(
        self,
        hidden: Float[Tensor, "M D"],
        head: Head,
        weight: Float[Tensor, "N D"],
        needs: Needs,
        factor: float,
        block_bytes: int,
    ):
        self._head, self._factor = head, factor
        wide = torch.promote_types(head.weight.dtype, torch.float32)
        a, b = head.lora or (None, None)
        self.hidden = torch.zeros_like(hidden) if needs.hidden else None
        self.weight = _accumulator(weight, len(hidden), block_bytes) if needs.weight else None
        self.bias = torch.zeros(head.vocab_size, dtype=wide, device=hidden.device) if needs.bias else None
        self.lora_a = torch.zeros_like(a, dtype=wide) if needs.lora_a and a is not None else None
        self.lora_b = torch.zeros_like(b, dtype=wide) if needs.lora_b and b is not None else None

    def add(self, rows: slice, inputs: Float[Tensor, "K D"], slopes: Float[Tensor, "K N"]) -> None:
        """Adds what a block of positions gives.

        Args:
            rows: the block.
            inputs: its hidden states, in the dtype of the products.
            slopes: the loss's gradient by the block's logits before scale and soft-cap, in the same dtype.
        """
        below = None
        if self._head.lora is not None:
            a, b = self._head.lora
            below = torch.mm(slopes, b)  # gradient by A's outputs
            if self.lora_a is not None:
                self.lora_a.add_(torch.mm(below.t(), inputs), alpha=self._factor)
            if self.lora_b is not None:
                self.lora_b.add_(torch.mm(slopes.t(), torch.mm(inputs, a.t())), alpha=self._factor)
        if self.hidden is not None:
            flow = torch.mm(slopes, self._head.weight)
            if below is not None and self._head.lora is not None:
                flow.addmm_(below, self._head.lora[0])
            self.hidden[rows] = flow.mul_(self._factor)
        if self.weight is not None:
            self._add_weight(self.weight, inputs, slopes)

    def add_bias(self, slopes: Float[Tensor, "K N"]) -> None:
        """Adds the bias's gradient, from slopes that are not rounded yet."""
        if self.bias is not None:
            self.bias.add_(slopes.sum(0), alpha=self._factor)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Returns them in the order of `Needs`."""
        return self.hidden, self.weight, self.bias, self.lora_a, self.lora_b

    def _add_weight(self, weight: Tensor, inputs: Tensor, slopes: Tensor) -> None:
        if weight.dtype == slopes.dtype:
            weight.addmm_(slopes.t(), inputs, alpha=self._factor)
            return
        length = max(1, _TILE_BYTES // (weight.element_size() * weight.shape[1]))
        for start in range(0, len(weight), length):
            tile = slice(start, start + length)
            weight[tile].add_(torch.mm(slopes[:, tile].t(), inputs), alpha=self._factor)


def _accumulator(weight: Tensor, num_positions: int, block_bytes: int) -> Tensor:
    """Zeros for the head's gradient."""
    num_bytes = 4 * weight.numel()
    naive = 4 * weight.shape[0] * num_positions
    is_cheap = num_bytes <= max(block_bytes, _FLOAT32_SHARE * naive)
    dtype = torch.promote_types(weight.dtype, torch.float32) if is_cheap else weight.dtype
    return torch.zeros(weight.shape, dtype=dtype, device=weight.device)
