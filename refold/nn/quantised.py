"""Linears and embeddings whose weights are stored as integers, and the tensors that hold them in any module."""

import copy
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from refold.blueprint.integers import Scheme, find_scheme
from refold.nn.bits import unpack_columns
from refold.nn.products import IntegerProduct, find_kernel
from refold.nn.rounding import Rounded, read_stored, round_weight
from refold.nn.stored_integers import StoredIntegers, keep_scales
from refold.nn.tinygemm import ROWS, make_product


class IntegerWeight(nn.Module):
    """A module with one weight that is stored as integers.

    The parameters are those of compressed-tensors' `pack-quantized`. `prepare` replaces them by the layout of a kernel,
    `restore` brings them back; the weight is in memory once.

    Args:
        shape: `(out, in)` of the weight.
        scheme: Its scheme.
    """

    def __init__(self, shape: tuple[int, int], scheme: Scheme):
        super().__init__()
        self.shape, self.scheme = shape, scheme
        self.stored = StoredIntegers(self, {"weight": (scheme, shape)})
        # Has the dtype of the model, which integers do not show.
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.product: IntegerProduct | None = None

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight as floats in the dtype of the model; a new tensor each time."""
        return self.dequantise(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model."""
        return self.get_buffer("like").dtype

    def rounded(self) -> Rounded:
        """Returns the integers of the weight."""
        if self.product is not None:
            return self.product.unpack()
        return self.stored.read("weight")

    def set(self, weight: Rounded) -> None:
        """Sets the weight."""
        self.restore()
        self.stored.write("weight", weight)

    def dequantise(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Returns the weight as floats."""
        return self.rounded().dequantise().to(dtype)

    def reset(self) -> None:
        """Sets a weight of zeros."""
        if self.product is None:
            self.stored.reset()

    def take(self, product: IntegerProduct) -> None:
        """Replaces the parameters by a product that holds the weight."""
        self.product = product
        for piece in self.scheme.pieces(*self.shape):
            self._parameters.pop(f"weight{piece.suffix}", None)

    def restore(self) -> None:
        """Replaces the product by the parameters."""
        if self.product is None:
            return
        weight = self.product.unpack()
        self.product = None
        self.stored = StoredIntegers(self, {"weight": (self.scheme, self.shape)}, weight.scale.device)
        self.stored.write("weight", weight)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for pickle: the weight as stored, because a kernel's layout depends on the processor."""
        if self.product is None:
            return self.__dict__
        plain = IntegerWeight(self.shape, self.scheme)
        plain.product = self.product
        plain.restore()
        parameters = {**self._parameters, **plain._parameters}
        # Both read the same dict of parameters.
        plain.stored.move_to(parameters)
        return {**self.__dict__, "product": None, "stored": plain.stored, "_parameters": parameters}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.restore()
        keep_scales(self, lambda: super(IntegerWeight, self)._apply(fn, recurse))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.product is not None:
            held = self.rounded().store(self.scheme)
            destination.update({f"{prefix}weight{suffix}": value for suffix, value in held.items()})
        # A loader may have widened it.
        name = f"{prefix}weight_scale"
        destination[name] = destination[name].to(torch.bfloat16)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.shape[1]} -> {self.shape[0]}, bits={self.scheme.bits}, group={self.scheme.group}"


class QuantisedLinear(IntegerWeight):
    """y = W x + bias with W stored as integers.

    Where gradients flow to x, W is dequantised, in the backward pass again. Without gradients `prepare` may choose a
    kernel for few rows, which rounds activations to bfloat16; for many rows W is dequantised, unless that costs more
    than the kernel.

    Args:
        linear: The linear whose place it takes; its bias is taken over.
        scheme: The scheme of the weight.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, scheme: Scheme):
        super().__init__((linear.out_features, linear.in_features), scheme)
        self.out_features, self.in_features = self.shape
        self.register_parameter("bias", linear.bias)
        self._most_rows = 0

    def prepare(self) -> None:
        """Holds the integers as a kernel reads them, if a measurement finds it faster for one row.

        On CUDA the kernel is taken without a measurement, if its result is right.
        """
        if self.product is None and self.like.device.type == "cuda":
            product = make_product(self.rounded(), self.scheme)
            if product is not None:
                self._most_rows = ROWS
                self.take(product)
            return
        kernel = find_kernel(self.scheme, self.get_buffer("like").device)
        if self.product is not None or kernel is None or kernel.refusal(*self.shape, self.scheme) is not None:
            return
        threads = torch.get_num_threads()
        # A frozen model is hashable, which its type does not say.
        self._most_rows = most_rows(kernel, self.scheme, self.shape, self.dtype, threads)  # pyright: ignore[reportArgumentType]
        if self._most_rows:
            self.take(kernel(self.rounded(), None))
            if kernel.unpacks_by_products and self.dtype != torch.float32:
                # Reading the weight back costs a product with as many rows as it has inputs.
                self._most_rows = max(self._most_rows, self.in_features)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if torch.is_grad_enabled() and x.requires_grad:
            y = self._differentiable(x)
        elif self.product is not None and not torch.compiler.is_compiling():
            flat = x.reshape(-1, x.shape[-1])
            run = self.product if len(flat) <= self._most_rows else self._multiply
            y = run(flat).view(*x.shape[:-1], self.out_features)
        else:
            y = self._multiply(x)
        return y if self.bias is None else y + self.bias

    def _multiply(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantise(x.dtype))

    def _differentiable(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.compiler.is_compiling():
            return self._multiply(x)
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """W x that keeps no float weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantisedLinear) -> Tensor:
        ctx.linear = linear
        return nn.functional.linear(x, linear.dequantise(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.linear.dequantise(grads[0].dtype), None


class QuantisedEmbedding(IntegerWeight):
    """An embedding whose rows are stored as integers, and dequantised one by one.

    Args:
        embedding: The embedding whose place it takes.
        scheme: The scheme of the table.
    """

    def __init__(self, embedding: nn.Embedding, scheme: Scheme):
        super().__init__((embedding.num_embeddings, embedding.embedding_dim), scheme)
        self.num_embeddings, self.embedding_dim = self.shape

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        flat = ids.reshape(-1)
        if self.product is not None:
            found = self.product.rows(flat)
        else:
            found = self._read_rows(flat).dequantise()
        return found.to(self.dtype).view(*ids.shape, self.embedding_dim)

    def share(self, product: IntegerProduct) -> bool:
        """Reads rows from the product of a tied head, if it keeps rows apart; returns whether it does."""
        if product.keeps_rows:
            self.take(product)
        return product.keeps_rows

    def _read_rows(self, rows: Int[Tensor, " rows"]) -> Rounded:
        held: dict[str, Any] = {name.removeprefix("weight"): each for name, each in self._parameters.items()}
        chosen = {suffix: held[suffix].detach()[rows] for suffix in ("_packed", "_scale")}
        points = None
        if self.scheme.has_zero_point:
            points = unpack_columns(held["_zero_point"].detach().T, self.scheme.bits, rows).T
        return read_stored(chosen, self.scheme, (len(rows), self.embedding_dim), points)


def make_embedding(rows: int, columns: int, scheme: str | None) -> nn.Module:
    """Returns an embedding of floats, or of integers by the scheme of a name."""
    embedding = nn.Embedding(rows, columns)
    return embedding if scheme is None else QuantisedEmbedding(embedding, find_scheme(scheme))


MEASURED_ROWS = (1, 8, 64)
MEASURED_ELEMENTS = 1 << 20
"""A measured weight has at most so many elements; times grow with its rows."""


@functools.cache
def most_rows(
    kernel: type[IntegerProduct], scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, threads: int
) -> int:
    """Measures up to how many rows a kernel is faster than a product with the dequantised weight; 0: for none.

    Args:
        kernel: Of the integers.
        scheme: Of the weight.
        shape: Of the weight.
        dtype: Of activations.
        threads: Of torch; results hold for this number.
    """
    generator = torch.Generator().manual_seed(0)
    height = max(64, min(shape[0], MEASURED_ELEMENTS // shape[1]))
    rounded = round_weight(torch.randn((height, shape[1]), generator=generator), scheme)
    product, stored = kernel(rounded, None), rounded.store(scheme)
    found = 0

    def multiply(x: Tensor) -> Tensor:
        weight = read_stored(stored, scheme, (height, shape[1])).dequantise().to(x.dtype)
        return nn.functional.linear(x, weight)

    for rows in MEASURED_ROWS:
        x = torch.randn((rows, shape[1]), generator=generator).to(dtype)
        if _least_seconds(lambda x=x: product(x)) >= _least_seconds(lambda x=x: multiply(x)):
            break
        found = rows
    return found


def _least_seconds(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begun)
    return best


def prepare_integers(model: nn.Module) -> None:
    """Lets every quantised linear of a model choose a kernel; see `QuantisedLinear.prepare`."""
    for module in _integer_modules(model):
        if isinstance(module, QuantisedLinear):
            module.prepare()


def restore_integers(model: nn.Module) -> bool:
    """Brings the parameters of all quantised weights back; returns whether any was held by a product."""
    found = [module for module in _integer_modules(model) if module.product is not None]
    for module in found:
        module.restore()
    return bool(found)


def _integer_modules(model: nn.Module) -> Iterable[IntegerWeight]:
    return [module for module in model.modules() if isinstance(module, IntegerWeight)]
