"""The base class of stored parts: linears found by name, and norms and biases that a depth may replace."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from refold.blueprint.integers import find_scheme
from refold.families.arch import Norm
from refold.mixers.spec import Fill, Shape
from refold.nn.factored import BasisLinear, FactoredLinear
from refold.nn.fills import make_fill
from refold.nn.lora import LinearAdapter, PackedAdapter
from refold.nn.norms import StackNorm
from refold.nn.packed import PackedPart
from refold.nn.quantised import QuantisedLinear
from refold.nn.workshop import Workshop

Lora = Mapping[str, LinearAdapter]
"""Linear name to the adapter of the calling depth."""
OwnVectors = Mapping[str, Tensor] | None
"""Vector name to tensor where the calling depth has norms and biases of its own; None: the part's. Rows that stand at
several depths bring `[B, 1, size]`."""
OUTER_NORMS = ("input_norm", "output_norm")
"""Norms around a part, which an architecture may lack."""


class Vectors(nn.Module):
    """Vectors of a part that are neither norms nor biases of its linears, such as decays or a convolution.

    Args:
        shapes: Name (`a_log`) to shape.
        fills: The initial values of each.
    """

    def __init__(self, shapes: Mapping[str, Shape], fills: Mapping[str, Fill]):
        super().__init__()
        self.fills = dict(fills)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(make_fill(fills[name], shape)))

    def forward(self, name: str) -> Tensor:
        """Returns one vector. Offloading moves weights to the device for calls of `forward` only."""
        return self.get_parameter(name)

    def reset(self) -> None:
        """Fills all vectors anew."""
        for name, parameter in self.named_parameters():
            parameter.data.copy_(make_fill(self.fills[name], tuple(parameter.shape)))


class StoredPart(nn.Module):
    """Weights that several depths may run: everything that differs between depths arrives as arguments.

    Linears are plain `nn.Linear`s, so that tools that replace linears by name (weight-only quantisation, say) work.

    Args:
        linears: Linear name to `(out, in)`.
        vectors: Vector name to shape, as the part's spec lists them.
        norm: The architecture's norm; used for every vector called `*_norm.weight`.
        stores_vectors: Whether norms and biases live here, or arrive with each call.
        fills: The initial values of vectors besides norms and biases of linears.

    Attributes:
        input_groups: Names of linears that read one input, group by group.
        packed: The linears and norms as `pack` prepared them; None: it was not called.
    """

    input_groups: ClassVar[tuple[tuple[str, ...], ...]] = ()
    packed: PackedPart | None = None

    def __init__(
        self,
        linears: Mapping[str, tuple[int, int]],
        vectors: Mapping[str, Shape],
        norm: Norm,
        stores_vectors: bool,
        fills: Mapping[str, Fill] | None = None,
    ):
        super().__init__()
        fills = fills or {}
        self._lacking = frozenset(name for name in OUTER_NORMS if f"{name}.weight" not in vectors)
        for name, (rows, columns) in linears.items():
            bias = f"{name}.bias"
            linear = nn.Linear(columns, rows, bias=stores_vectors and bias in vectors)
            if linear.bias is not None and bias in fills:
                linear.bias.data.copy_(make_fill(fills[bias], vectors[bias]))
                # Otherwise transformers sets the biases of all linears of a new model to zero.
                linear.bias._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
            self.add_module(name, linear)
        for name, shape in vectors.items():
            owner, _, kind = name.rpartition(".")
            if owner.endswith("_norm") and kind == "weight":
                spec = norm.model_copy(update={"bias": f"{owner}.bias" in vectors})
                self.add_module(owner, StackNorm(spec, shape[0], stored=stores_vectors))
        self._fills = {name: fill for name, fill in fills.items() if "." not in name and stores_vectors}
        for name, fill in self._fills.items():
            self.register_parameter(name, nn.Parameter(make_fill(fill, vectors[name])))
        owners = dict.fromkeys(name.rpartition(".")[0] for name in fills)
        for owner in [each for each in owners if each and each not in linears] if stores_vectors else ():
            own = {name.rpartition(".")[2]: name for name in fills if name.startswith(f"{owner}.")}
            shapes = {kind: vectors[name] for kind, name in own.items()}
            self.add_module(owner, Vectors(shapes, {kind: fills[name] for kind, name in own.items()}))

    def reset(self) -> None:
        """Gives the vectors that are parameters of the part itself, such as `A_log`, their initial values."""
        for name, fill in self._fills.items():
            parameter = self.get_parameter(name)
            parameter.data.copy_(make_fill(fill, tuple(parameter.shape)))

    def store_as(self, factors: Mapping[str, int], bases: Mapping[str, int], schemes: Mapping[str, str]) -> None:
        """Gives linears the form in which they are stored: factors, bases, and integers of any of these."""
        self.factorise(factors)
        self.share_bases(bases)
        self.quantise(schemes)

    def factorise(self, ranks: Mapping[str, int]) -> None:
        """Stores some linears as two factors of the given rank; at rank 0 only depths' updates and the bias remain."""
        for name, rank in ranks.items():
            self.add_module(name, FactoredLinear(self.get_submodule(name), rank))  # pyright: ignore[reportArgumentType]

    def share_bases(self, ranks: Mapping[str, int]) -> None:
        """Stores only a basis of the given rank for some linears; the coefficients arrive with each call."""
        for name, rank in ranks.items():
            self.add_module(name, BasisLinear(self.get_submodule(name), rank))  # pyright: ignore[reportArgumentType]

    def quantise(self, schemes: Mapping[str, str]) -> None:
        """Stores the weight, the factors or the basis of some linears as integers, each by the scheme of a name."""
        for name, named in schemes.items():
            linear, scheme = self.get_submodule(name), find_scheme(named)
            if isinstance(linear, nn.Linear):
                self.add_module(name, QuantisedLinear(linear, scheme))
                continue
            for side, factor in list(linear.named_children()):
                linear.add_module(side, QuantisedLinear(factor, scheme))  # pyright: ignore[reportArgumentType]

    def leave_out(self, names: Iterable[str]) -> None:
        """Removes linears and norms that none of the depths that run this part uses."""
        for name in names:
            if hasattr(self, name):
                delattr(self, name)

    def vector(self, name: str, vectors: OwnVectors) -> Tensor:
        """Returns a vector of the part, or the depth's own vector where it has some."""
        if vectors is not None:
            return vectors[name]
        owner, _, kind = name.rpartition(".")
        return getattr(self, owner)(kind) if owner else self.get_parameter(kind)

    def normalise(
        self, name: str, x: Float[Tensor, "*batch size"], vectors: OwnVectors
    ) -> Float[Tensor, "*batch size"]:
        """Runs one of the part's norms, with the depth's own weights where it has some.

        Returns `x` unchanged for a norm around the part (`OUTER_NORMS`) that the architecture lacks.
        """
        if self.packed is not None:
            return self.packed.normalise(name, x, vectors)
        if name in self._lacking:
            return x
        norm = getattr(self, name)
        if vectors is None:
            return norm(x)
        return norm(x, vectors[f"{name}.weight"], vectors.get(f"{name}.bias"))

    def project(
        self, name: str, x: Float[Tensor, "*batch in"], lora: Lora, vectors: OwnVectors
    ) -> Float[Tensor, "*batch out"]:
        """Runs one of the part's linears, with the adapter and the bias of the calling depth."""
        if self.packed is not None:
            return self.packed.project((name,), x, lora, vectors)
        adapter, linear = lora.get(name), getattr(self, name)
        assert not isinstance(adapter, PackedAdapter)
        y = linear(x) if adapter is None else adapter.project(linear, x)
        if vectors is not None and f"{name}.bias" in vectors:
            y = y + vectors[f"{name}.bias"]
        return y if adapter is None else adapter.apply(y, x)

    def project_all(
        self, names: tuple[str, ...], x: Float[Tensor, "*batch in"], lora: Lora, vectors: OwnVectors
    ) -> tuple[Tensor, ...]:
        """Runs several linears of one group of `input_groups`; a packed part does so with one product."""
        if self.packed is not None:
            return self.packed.split(names, self.packed.project(names, x, lora, vectors))
        return tuple(self.project(name, x, lora, vectors) for name in names)

    def pack(self, workshop: Workshop, format: str) -> PackedPart:
        """Replaces the linears by products that are prepared for inference, and drops the weights they were made of."""
        self.packed = PackedPart(self, self.input_groups, workshop, format)
        self.leave_out(self.packed.names)
        return self.packed

    def compile_regions(self) -> None:
        """Compiles the computations of this part between cache accesses, once for all depths that run it."""
        raise NotImplementedError
