"""Products with weights of 4 bits on CUDA, by torch's tinygemm kernel."""

import torch
from torch import Tensor

from refold.blueprint.integers import Scheme
from refold.nn.products import Int4Product
from refold.nn.rounding import Rounded

INNER_TILES = 8
"""Tiles of 16 inputs that a thread of the kernel reads at once."""
ROWS = 16
"""Rows up to which the kernel runs. It reads the weight again for every 8 rows; no machine here has measured it."""
TOLERANCE = 0.03
"""Largest relative difference of one product from that of the dequantised weight: activations are bfloat16."""


class TinygemmProduct(Int4Product):
    """Integers of 4 bits with a scale and a zero for each group, in the layout of CUDA's tensor cores."""

    @classmethod
    def refusal(cls, rows: int, columns: int, scheme: Scheme) -> str | None:
        if columns % (16 * INNER_TILES) or columns % (scheme.group or columns):
            return f"its inputs are no multiple of {16 * INNER_TILES}"
        return "its outputs are no multiple of 8" if rows % 8 else None

    def pack(self, weight: Rounded) -> int:
        self.group, self._extra = weight.integers.shape[2], 0
        integers = weight.integers.flatten(1).to(torch.uint8)
        pairs = (integers[:, ::2] << 4) | integers[:, 1::2]
        self._integers = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), INNER_TILES)
        joined = torch.cat((weight.scale, self._zero(weight)), dim=-1).transpose(0, 1)
        self._scales = joined.contiguous().to(torch.bfloat16)
        self._run = torch.ops.aten._weight_int4pack_mm.default
        return self._integers.nbytes + self._scales.nbytes

    def keep_some(self, outputs: slice) -> bool:
        return False

    def agrees(self, weight: Rounded) -> bool:
        """Says whether the kernel gives the product of the dequantised weight on this device."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((1, self.shape[1]), generator=generator).to(self._scales.device, torch.bfloat16)
        expected = x.float() @ weight.dequantise().T
        try:
            found: Tensor = self(x).float()
        except RuntimeError:
            return False
        return bool((found - expected).norm() <= TOLERANCE * expected.norm())


def make_product(weight: Rounded, scheme: Scheme) -> TinygemmProduct | None:
    """Returns the product of a weight on a CUDA device; None: the kernel is not there, or refuses the weight."""
    if scheme.bits != 4 or not hasattr(torch.ops.aten, "_weight_int4pack_mm"):
        return None
    if TinygemmProduct.refusal(len(weight.integers), weight.columns, scheme) is not None:
        return None
    try:
        product = TinygemmProduct(weight, None)
    except (RuntimeError, NotImplementedError):
        return None
    return product if product.agrees(weight) else None
