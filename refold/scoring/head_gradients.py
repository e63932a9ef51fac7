"""Sums of the gradients of hidden states and head over blocks of positions."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from refold.scoring.head import Head

_FLOAT32_SHARE = 0.15  # largest float32 gradient of the head as a share of all logits, of which full logits hold copies
_TILE_BYTES = 32 * 2**20  # size of a tile of the head's gradient, to which products of another dtype are added


class Needs(NamedTuple):
    """Flags that say which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool


class HeadGradients:
    """Sums of the gradients of a loss with respect to hidden states and to the tensors of a head.

    In half precision the gradient of the head is summed in float32 if that takes little memory compared with a block or
    with all logits, and else in the weight's dtype.

    Args:
        hidden: Hidden states of all positions `[M, D]`, in the dtype of their gradient.
        head: The head in the dtype of its products.
        weight: The weight of the head in its stored dtype.
        needs: The gradients to compute.
        factor: Factor of all gradients.
        block_bytes: Size of the float32 logits of a block.
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
        """Adds the gradients of a block of positions.

        Args:
            rows: The positions of the block.
            inputs: Hidden states of the block, in the dtype of the products.
            slopes: Gradient with respect to the logits of the block before scale and soft-cap, in the same dtype.
        """
        below = None
        if self._head.lora is not None:
            a, b = self._head.lora
            below = torch.mm(slopes, b)  # gradient with respect to the outputs of A
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
        """Adds the gradient of the bias, from slopes before they are rounded."""
        if self.bias is not None:
            self.bias.add_(slopes.sum(0), alpha=self._factor)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Returns the gradients in the order of `Needs`."""
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
    """Returns zeros for the gradient of the head, in float32 or in the weight's dtype."""
    num_bytes = 4 * weight.numel()
    naive = 4 * weight.shape[0] * num_positions
    is_cheap = num_bytes <= max(block_bytes, _FLOAT32_SHARE * naive)
    dtype = torch.promote_types(weight.dtype, torch.float32) if is_cheap else weight.dtype
    return torch.zeros(weight.shape, dtype=dtype, device=weight.device)
