"""The preparation of weights for products, all of one model with the same settings."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from refold.blueprint.integers import SCHEMES, Scheme
from refold.nn.products import (
    FEW_ELEMENTS,
    INTEGERS,
    NEVER,
    IntegerProduct,
    LaidOutProduct,
    PlainProduct,
    Product,
    SideBySide,
    can_lay_out,
    count_rows,
    find_kernel,
)
from refold.nn.rounding import round_weight
from refold.nn.weights import StoredWeight, Weight, as_floats, stack_weights


class Workshop:
    """Prepares weights for products, all with the same settings.

    Args:
        dtype: Dtype of activations, and of weights that are no integers.
        device: Of the weights.
        keep_dense: Whether a second copy of a weight in `dtype` may be held where it is faster for many rows.
        keep_integers: Whether weights that are stored as integers are held so, whatever format is asked for.

    Attributes:
        refused: Line by line, which weights are held in another format than asked for, and why.
        num_bytes: Of all weights that were prepared.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, keep_dense: bool = False, keep_integers: bool = True):
        self.dtype, self.keep_dense, self._keep_integers = dtype, keep_dense, keep_integers
        self.refused: list[str] = []
        self.num_bytes = 0
        self._device = device
        self._lays_out = device.type == "cpu" and can_lay_out(dtype)

    def make(
        self,
        name: str,
        weight: Weight,
        bias: Tensor | None,
        format: str,
        *,
        shares: bool = False,
    ) -> Product:
        """Returns the product of a weight.

        Args:
            name: Of the weight, for `refused`.
            weight: In floats; or stored as integers, which are held as they are in place of the format.
            bias: `[out]`; None: there is none.
            format: To hold the weight in.
            shares: Whether the weight stays in memory for another use, so that a copy costs memory.
        """
        bias = None if bias is None else bias.detach().to(self.dtype)
        product = self._choose(name, weight, bias, format, shares)
        self.num_bytes += 0 if shares and isinstance(product, PlainProduct) else product.num_bytes
        return product

    def make_beside(self, name: str, weights: Sequence[Weight], bias: Tensor | None, format: str) -> Product:
        """Returns the product of weights that read one input, their outputs side by side; arguments as for `make`."""
        joined = stack_weights(weights)
        if joined is not None:
            return self.make(name, joined, bias, format)
        ends = list(itertools.accumulate(each.shape[0] for each in weights))
        biases = [None] * len(ends) if bias is None else list(bias.tensor_split(ends[:-1]))
        pairs = zip(weights, biases, strict=True)
        return SideBySide([self.make(name, weight, own, format) for weight, own in pairs])

    def _choose(self, name: str, weight: Weight, bias: Tensor | None, format: str, shares: bool) -> Product:
        if not self._keep_integers:
            weight = as_floats(weight)
        if isinstance(weight, StoredWeight):
            scheme, kernel = weight.scheme, find_kernel(weight.scheme, self._device)
        else:
            scheme, kernel = SCHEMES.get(format), INTEGERS.get(format)
        if scheme is not None:
            rows, columns = weight.shape[0], weight.shape[1]
            reason = "there is no kernel" if kernel is None else kernel.refusal(rows, columns, scheme)
            if kernel is not None and reason is None:
                return self._make_integers(kernel, weight, bias, scheme)
            bits = f"int{scheme.bits}"
            self.refused.append(f"{name} {tuple(weight.shape)} is held in {self.dtype}, not in {bits}: {reason}")
        weight = as_floats(weight)
        weight = weight.detach().to(self.dtype)
        is_small = self.dtype == torch.float32 and weight.numel() < FEW_ELEMENTS
        if not self._lays_out or is_small or (shares and not self.keep_dense):
            return PlainProduct(weight, bias)
        return LaidOutProduct(weight, bias)

    def most_zeros(self, format: str) -> int:
        """Returns the number of zeros that a product reads while two further small products of a format would begin."""
        if format in INTEGERS:
            return 200_000
        return 500_000 if self.dtype == torch.bfloat16 else 0

    def _make_integers(
        self, kernel: type[IntegerProduct], weight: Weight, bias: Tensor | None, scheme: Scheme
    ) -> Product:
        rounded = weight.rounded if isinstance(weight, StoredWeight) else round_weight(weight.detach(), scheme)
        if not self.keep_dense:
            return kernel(rounded, bias)
        rows = count_rows(kernel, tuple(weight.shape), self.dtype, torch.get_num_threads())
        if rows == NEVER:
            return kernel(rounded, bias)
        floats = kernel.read(rounded).to(self.dtype)
        many = LaidOutProduct(floats, bias) if self._lays_out else PlainProduct(floats, bias)
        return kernel(rounded, bias, many, rows)
