"""Products with weights that are prepared for inference: y = x W^T + b by the kernels of torch that read W fastest."""

import copy
import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refold.blueprint.integers import COMMON_SCHEMES, SCHEMES, Scheme
from refold.nn.rounding import Rounded, round_weight

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Formats of weights that are dtypes; the others are the quantisation schemes that have kernels."""
FORMATS = (*FLOATS, *COMMON_SCHEMES)
"""Names of all formats."""
ROWS_OF_LAYOUT = 64
"""Number of rows oneDNN is told when it lays a weight out. It runs other numbers with the same layout; from 1 row to
256 that is at most a tenth slower than a layout for that number."""
FEW_ELEMENTS = 49_152
"""A float32 weight of fewer elements goes to the BLAS as it is: oneDNN takes 10 microseconds longer to begin."""
UNPACKED_COLUMNS = 512
"""Columns that are read from a kernel's layout at once."""
NEVER = 1 << 62
"""More rows than a call has."""


class Product(ABC):
    """y = x W^T + b with one fixed weight; without gradients.

    Attributes:
        shape: `(out, in)`.
        num_bytes: Bytes of the weight in all forms that are held, the bias left out.
    """

    shape: tuple[int, int]
    num_bytes: int

    @abstractmethod
    def __call__(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """Returns the product in the dtype of x."""

    def add_to(self, y: Float[Tensor, "rows out"], x: Float[Tensor, "rows in"]) -> None:
        """Adds the product to y in place; y may be columns of a wider tensor."""
        y.add_(self(x))

    @abstractmethod
    def cut(self, outputs: slice) -> "Product | None":
        """Returns the product for some outputs; None: the form in which the weight is held cannot be cut there."""


class PlainProduct(Product):
    """The product of a weight that lies in memory as it is, and may be shared with others."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Tensor | None):
        self.shape, self.num_bytes = (len(weight), weight.shape[1]), weight.nbytes
        self._weight, self._bias, self._turned = weight, bias, weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._weight, self._bias)

    def add_to(self, y: Tensor, x: Tensor) -> None:
        if self._bias is not None:
            y.add_(self._bias)
        y.addmm_(x, self._turned)

    def cut(self, outputs: slice) -> Product:
        return PlainProduct(self._weight[outputs], _cut(self._bias, outputs))


class LaidOutProduct(Product):
    """The product of a weight in oneDNN's own layout, which it reads about twice as fast as rows."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Tensor | None):
        self.shape, self.num_bytes = (len(weight), weight.shape[1]), weight.nbytes
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_OF_LAYOUT)
        self._bias, self._run = bias, torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x, self._weight, self._bias, "none", [], "")

    def cut(self, outputs: slice) -> Product:
        return LaidOutProduct(self._weight.to_dense()[outputs], _cut(self._bias, outputs))


class SideBySide(Product):
    """Products that read one input, their outputs side by side.

    Args:
        products: In order.
    """

    def __init__(self, products: Sequence[Product]):
        self._products = list(products)
        self.shape = (sum(each.shape[0] for each in products), products[0].shape[1])
        self.num_bytes = sum(each.num_bytes for each in products)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([each(x) for each in self._products], dim=1)

    def cut(self, outputs: slice) -> Product | None:
        found, begin = [], 0
        for each in self._products:
            first, last = max(outputs.start - begin, 0), min(outputs.stop - begin, each.shape[0])
            if first < last:
                some = each if last - first == each.shape[0] else each.cut(slice(first, last))
                if some is None:
                    return None
                found.append(some)
            begin += each.shape[0]
        return found[0] if len(found) == 1 else SideBySide(found)


class IntegerProduct(Product):
    """The product of a weight held as integers, whose kernel reads activations in bfloat16.

    Args:
        weight: Rounded to the scheme's integers.
        bias: Added to the product.
        many: The product for many rows; None: the kernel runs all.
        many_rows: From how many rows on `many` runs.
    """

    def __init__(self, weight: Rounded, bias: Tensor | None, many: Product | None = None, many_rows: int = NEVER):
        self.shape = (len(weight.integers), weight.columns)
        self._bias, self._many, self._many_rows = bias, many, many_rows
        self.num_bytes = self.pack(weight) + (0 if many is None else many.num_bytes)

    keeps_rows: ClassVar[bool] = False
    """Whether `rows` can read some rows of the weight."""
    unpacks_by_products: ClassVar[bool] = False
    """Whether `unpack` runs the kernel, with as many rows as the weight has inputs."""

    @classmethod
    @abstractmethod
    def refusal(cls, rows: int, columns: int, scheme: Scheme) -> str | None:
        """Returns the rule that a shape breaks; None: the kernel takes it."""

    @abstractmethod
    def unpack(self) -> Rounded:
        """Returns the integers that the product was made of."""

    def rows(self, places: Tensor) -> Float[Tensor, "some in"]:
        """Returns some rows of the weight in float32."""
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def read(cls, weight: Rounded) -> Float[Tensor, "out in"]:
        """Returns the weight as the kernel reads it, in float32."""

    @abstractmethod
    def pack(self, weight: Rounded) -> int:
        """Holds the integers as the kernel wants them, and returns their bytes."""

    @abstractmethod
    def run(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """Runs the kernel on activations in bfloat16."""

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) >= self._many_rows:
            assert self._many is not None
            return self._many(x)
        if x.data_ptr() % 32 or x.stride(0) % 16 or not x.is_contiguous():
            # The kernels load 16 activations at once, from addresses that are multiples of their size; others crash.
            # That of int4 refuses columns of a wider tensor.
            x = x.clone(memory_format=torch.contiguous_format)
        y = self.run(x) if x.dtype == torch.bfloat16 else self.run(x.to(torch.bfloat16)).to(x.dtype)
        return y if self._bias is None else y.add_(self._bias)

    @abstractmethod
    def keep_some(self, outputs: slice) -> bool:
        """Drops the integers of other outputs; False: they cannot be cut there."""

    def cut(self, outputs: slice) -> Product | None:
        found = copy.copy(self)
        if not found.keep_some(outputs):
            return None
        found.shape, found._bias = (outputs.stop - outputs.start, self.shape[1]), _cut(self._bias, outputs)
        if self._many is not None:
            found._many = self._many.cut(outputs)
        return found


class Int8Product(IntegerProduct):
    """Integers of 8 bits with one scale for each output."""

    keeps_rows = True

    @classmethod
    def refusal(cls, rows: int, columns: int, scheme: Scheme) -> str | None:
        # The kernel reads 16 columns at a time, past the end of the weight where they are no multiple of 16.
        return None if columns % 16 == 0 else "its inputs are no multiple of 16"

    @classmethod
    def read(cls, weight: Rounded) -> Tensor:
        return weight.dequantise()

    def pack(self, weight: Rounded) -> int:
        self._integers = weight.integers.flatten(1).to(torch.int8)
        self._scales = weight.scale.flatten().to(torch.bfloat16)
        return self._integers.nbytes + self._scales.nbytes

    def run(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self._integers, self._scales)

    def unpack(self) -> Rounded:
        scale = self._scales.float().view(-1, 1, 1)
        return Rounded(self._integers.float().unsqueeze(1), scale, torch.zeros_like(scale), self.shape[1])

    def rows(self, places: Tensor) -> Tensor:
        return self._integers[places].float() * self._scales[places].float().unsqueeze(1)

    def keep_some(self, outputs: slice) -> bool:
        self._integers, self._scales = self._integers[outputs], self._scales[outputs]
        return True


class Int4Product(IntegerProduct):
    """Integers of 4 bits with a scale and a zero for each group of inputs: `scale * (integer - 8) + zero`.

    The zero, `scale * (8 - zero_point)`, is rounded to bfloat16; with the zero point 8 of symmetric groups it is 0.
    """

    unpacks_by_products = True

    @classmethod
    def refusal(cls, rows: int, columns: int, scheme: Scheme) -> str | None:
        return f"its inputs are no multiple of {scheme.group}" if columns % (scheme.group or columns) else None

    @classmethod
    def read(cls, weight: Rounded) -> Tensor:
        zero = cls._zero(weight).to(torch.bfloat16).float()
        return (weight.scale * (weight.integers - 8) + zero).flatten(1)

    def pack(self, weight: Rounded) -> int:
        self.group = weight.integers.shape[2]
        # The kernel takes outputs by sixteens.
        self._extra = -self.shape[0] % 16
        integers = nn.functional.pad(weight.integers.flatten(1).to(torch.int32), (0, 0, 0, self._extra))
        self._integers = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
        joined = torch.cat((weight.scale, self._zero(weight)), dim=-1).transpose(0, 1)
        self._scales = nn.functional.pad(joined, (0, 0, 0, self._extra)).contiguous().to(torch.bfloat16)
        self._run = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        return self._integers.nbytes + self._scales.nbytes

    def run(self, x: Tensor) -> Tensor:
        y = self._run(x, self._integers, self.group, self._scales)
        return y[:, : self.shape[0]] if self._extra else y

    def unpack(self) -> Rounded:
        rows, columns = self.shape
        # The layout depends on the processor, so the kernel itself reads the integers: as the columns of the product
        # with the identity, with scales of 1 and zeros of 0.
        plain = torch.zeros_like(self._scales)
        plain[..., 0] = 1
        integers = torch.empty(rows, columns, device=self._scales.device)
        for first in range(0, columns, UNPACKED_COLUMNS):
            last = min(first + UNPACKED_COLUMNS, columns)
            chosen = torch.zeros(last - first, columns, dtype=torch.bfloat16, device=self._scales.device)
            chosen[torch.arange(last - first), torch.arange(first, last)] = 1
            integers[:, first:last] = self._run(chosen, self._integers, self.group, plain)[:, :rows].T + 8
        scale, zero = (each.unsqueeze(-1) for each in self._scales[:, :rows].transpose(0, 1).float().unbind(-1))
        # The zero is rounded to bfloat16, by less than a thirtieth of a step.
        zero_point = (8 - zero / scale).round()
        return Rounded(integers.view(rows, -1, self.group), scale, zero_point, columns)

    def keep_some(self, outputs: slice) -> bool:
        # The kernel's order is its own inside blocks of 64 outputs; a last block may be smaller.
        is_end = outputs.stop == self.shape[0]
        if outputs.start % 64 or (outputs.stop % 64 and not is_end):
            return False
        last = None if is_end else outputs.stop
        self._integers = self._integers[outputs.start : last]
        self._scales = self._scales[:, outputs.start : last].contiguous()
        self._extra = self._extra if is_end else 0
        return True

    @staticmethod
    def _zero(weight: Rounded) -> Tensor:
        return weight.scale * (8 - weight.zero_point)


def _cut(bias: Tensor | None, outputs: slice) -> Tensor | None:
    return None if bias is None else bias[outputs]


INTEGERS: dict[str, type[IntegerProduct]] = {"int8": Int8Product, "int4": Int4Product, "int4z": Int4Product}
"""Formats that are schemes, with their kernels."""
INT4_GROUPS = (32, 64, 128, 256)


def find_kernel(scheme: Scheme, device: torch.device) -> type[IntegerProduct] | None:
    """Returns the kernel that multiplies weights of a scheme on a device; None: there is none."""
    if device.type != "cpu":
        return None
    if scheme.bits == 8 and scheme.group is None and not scheme.has_zero_point:
        return Int8Product
    return Int4Product if scheme.bits == 4 and scheme.group in INT4_GROUPS else None


@functools.cache
def can_lay_out(dtype: torch.dtype) -> bool:
    """Says whether oneDNN multiplies weights of a dtype in a layout of its own."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


MEASURED_ROWS = (64, 32, 16, 8, 4, 2, 1)
MEASURED_BYTES, MOST_COPIES = 1 << 26, 32
"""Weights in floats of so many bytes are multiplied in turn while timing, as a stack's are; fewer stay in cache."""
MARGIN = 1.1
"""Floats take a number of rows over where they are so many times as fast; measurements vary by as much."""


@functools.cache
def count_rows(kernel: type[IntegerProduct], shape: tuple[int, int], dtype: torch.dtype, threads: int) -> int:
    """Measures from how many rows on a weight in floats is faster than a kernel of integers; `NEVER`: up to 64 none.

    Args:
        kernel: Of the integers.
        shape: Of the weight.
        dtype: Of activations and of the weight in floats.
        threads: Of torch; results hold for this number.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    rounded = round_weight(weight, next(SCHEMES[name] for name, each in INTEGERS.items() if each is kernel))
    copies = max(1, min(MOST_COPIES, MEASURED_BYTES // (weight.numel() * dtype.itemsize)))
    integers = [kernel(rounded, None) for _ in range(copies)]
    prepare = LaidOutProduct if can_lay_out(dtype) else PlainProduct
    floats = [prepare(weight.to(dtype, copy=True), None) for _ in range(copies)]
    found = NEVER
    for rows in MEASURED_ROWS:
        x = torch.randn((rows, shape[1]), generator=generator).to(dtype)
        if MARGIN * _least_seconds(floats, x) >= _least_seconds(integers, x):
            break
        found = rows
    return found


def _least_seconds(products: Sequence[Product], x: Tensor) -> float:
    """Returns the seconds of one product, by the fastest of several calls of each."""
    best = [float("inf")] * len(products)
    for _ in range(4):
        for place, product in enumerate(products):
            begun = time.perf_counter()
            product(x)
            best[place] = min(best[place], time.perf_counter() - begun)
    return sum(best) / len(best)
