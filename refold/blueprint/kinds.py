"""Kinds of tensors: the interface that every kind has, and the kinds that are stored once."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Literal

from refold.blueprint.integers import Scheme, StoredPiece, find_scheme
from refold.blueprint.origins import (
    Initialisation,
    Origin,
    averaged,
    carry_over,
    describe_svd,
    describe_weighting,
    is_relaxed,
    tied_layers,
)
from refold.blueprint.part_sizes import LAST_LINEARS, kept_units
from refold.blueprint.schema import Blueprint, Pool
from refold.families.arch import ArchSpec
from refold.mixers.spec import Fill, Shape

Place = Literal["embedding", "head", "final_norm", "stack", "exits"]
"""Entry of the parameter count that a tensor belongs to."""


class TensorKind(ABC):
    """The rules for tensors of one purpose: origin, initial values, training, quantisation and plan text."""

    place: ClassVar[Place] = "stack"
    groups: ClassVar[frozenset[str]] = frozenset()
    """Names of the heal groups that the tensors belong to, besides the group of their pool."""
    is_fitted: ClassVar[bool] = False
    """Whether the tensors are computed from linears of the source, together with all tensors of the tied linear."""

    @abstractmethod
    def origin(self, blueprint: Blueprint, starts: Initialisation, tensor: "TargetTensor") -> Origin:
        """Returns the source layers and the method that a tensor is initialised with."""

    @abstractmethod
    def fill(self, blueprint: Blueprint, tensor: "TargetTensor") -> Fill:
        """Returns the initial values of a fresh tensor."""

    def explain(self, made: Origin, blueprint: Blueprint, starts: Initialisation, tensor: "TargetTensor") -> str | None:
        """Returns the reason in a plan line; None: the plan derives the reason from the layout of the source."""
        return None

    def line_name(self, tensor: "TargetTensor") -> str:
        """Returns the name of a tensor in a plan line; a `*` joins several tensors to one line."""
        return tensor.name

    def is_matrix(self, tensor: "TargetTensor") -> bool:
        """Says whether Muon updates the tensor, which is for matrices between embedding and head."""
        return False

    def decays(self, tensor: "TargetTensor") -> bool:
        """Says whether weight decay applies to the tensor."""
        return self.is_matrix(tensor)

    def is_quantised(self, blueprint: Blueprint, tensor: "TargetTensor") -> bool:
        """Says whether weight-only quantisation rounds the tensor."""
        return False


@dataclass(frozen=True)
class TargetTensor:
    """One tensor of the target.

    Attributes:
        name: Name in the model folder, such as `model.mixers.0.q_proj.weight`.
        shape: Shape.
        kind: Kind, which holds the rules for tensors of its purpose.
        pool: `mixer` or `mlp`, for tensors of a part and for tensors of a depth that act on a part.
        part: Index of the stored part; None for tensors of a depth.
        depth: Index of the depth that owns the tensor; None for tensors of a part or outside the stack.
        local: Name inside the part, such as `q_proj.weight` or `input_norm.weight`. For LoRAs and coefficients, the
            name of the linear, such as `q_proj`; for exits, the name inside the exit, such as `lora.lm_head.a`.
        piece: For one of the tensors that hold a quantised weight, its place among them; None: a tensor of floats.
    """

    name: str
    shape: Shape
    kind: TensorKind
    pool: Pool | None = None
    part: int | None = None
    depth: int | None = None
    local: str = ""
    piece: StoredPiece | None = None

    @property
    def linear(self) -> str:
        """Name of the linear that a weight, factor, LoRA or coefficient tensor belongs to, such as `q_proj`."""
        return self.local.split(".")[0]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def groups(self) -> frozenset[str]:
        """Names of the heal groups that the tensor belongs to, such as `mixers` and `adapters`."""
        return self.kind.groups | (frozenset() if self.pool is None else {f"{self.pool}s"})

    def scheme_name(self, blueprint: Blueprint) -> str | None:
        """Returns the name of the scheme by which the weight is stored; None: it is stored as floats."""
        if self.kind.place in ("embedding", "head"):
            return blueprint.quantised.get(self.kind.place)
        if not self.kind.is_quantised(blueprint, self):
            return None
        if self.depth is not None:
            return blueprint.depths[self.depth].quantised.get(self.linear)
        assert self.pool is not None
        return blueprint.pool(self.pool)[self.part_in(blueprint)].quantised.get(self.linear)

    def scheme(self, blueprint: Blueprint) -> Scheme | None:
        """Returns the scheme by which the weight is stored; None: it is stored as floats."""
        name = self.scheme_name(blueprint)
        return None if name is None else find_scheme(name)

    def stored_as(self, scheme: Scheme) -> "tuple[TargetTensor, ...]":
        """Returns the tensors that hold the weight by a scheme."""
        rows, columns = self.shape
        return tuple(
            replace(self, name=f"{self.name}{piece.suffix}", shape=piece.shape, piece=piece)
            for piece in scheme.pieces(rows, columns)
        )

    def part_in(self, blueprint: Blueprint) -> int:
        """Returns the index of the stored part: the tensor's own, or the one that its depth runs."""
        assert self.pool is not None
        if self.part is not None:
            return self.part
        assert self.depth is not None
        part = getattr(blueprint.depths[self.depth], self.pool)
        assert part is not None
        return part

    def origin(self, blueprint: Blueprint, starts: Initialisation) -> Origin:
        """Returns the source layers and the method that the tensor is initialised with."""
        return self.kind.origin(blueprint, starts, self)

    def fill(self, blueprint: Blueprint) -> Fill:
        """Returns the initial values of the tensor, should it be fresh."""
        return self.kind.fill(blueprint, self)


ZEROS = Fill("constant")


def norm_fill(arch: ArchSpec, local: str) -> Fill:
    """Returns the initial values of a fresh norm weight (effective scale 1) or bias (0)."""
    return Fill("constant", 1.0 - arch.norm.offset) if local.endswith("norm.weight") else ZEROS


def vector_fill(blueprint: Blueprint, pool: Pool, part: int, local: str) -> Fill:
    """Returns the initial values of a fresh vector of a part, whether the part or a depth stores the vector."""
    if pool == "mixer":
        asked = blueprint.mixers[part].mixer.fills(blueprint.part_arch("mixer", part)).get(local)
        if asked is not None:
            return asked
    return norm_fill(blueprint.arch, local)


def matrix_fill(blueprint: Blueprint) -> Fill:
    """Returns the initial values of a fresh matrix."""
    return Fill("normal", blueprint.arch.initializer_range)


class _OutsideStack(TensorKind):
    """A tensor outside the stack, which is copied from the source."""

    def origin(self, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> Origin:
        return Origin("fresh" if starts.weights == "fresh" else "copied", tensor.name.removeprefix("model."))

    def fill(self, blueprint: Blueprint, tensor: TargetTensor) -> Fill:
        return matrix_fill(blueprint)


class EmbeddingTensor(_OutsideStack):
    """The embedding, which a tied head shares. No weight decay: a row has a gradient only if its token occurs."""

    place = "embedding"
    groups = frozenset({"embeddings"})


class HeadTensor(_OutsideStack):
    """The untied head. It has weight decay, but AdamW updates it, because Muon is for matrices inside the stack."""

    place = "head"
    groups = frozenset({"head"})

    def decays(self, tensor: TargetTensor) -> bool:
        return True


class FinalNormTensor(_OutsideStack):
    """The weight or bias of the norm before the head."""

    place = "final_norm"
    groups = frozenset({"vectors"})

    def fill(self, blueprint: Blueprint, tensor: TargetTensor) -> Fill:
        return norm_fill(blueprint.arch, tensor.local)


class VectorTensor(TensorKind):
    """A norm, a bias or another vector, stored in a part."""

    groups = frozenset({"vectors"})

    def origin(self, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> Origin:
        assert tensor.pool is not None
        found = carry_over(blueprint, starts, tensor.pool, tensor.part_in(blueprint), tensor.local)
        return Origin("fresh", f"{tensor.pool}.{tensor.local}") if found is None else averaged(*found)

    def fill(self, blueprint: Blueprint, tensor: TargetTensor) -> Fill:
        assert tensor.pool is not None
        return vector_fill(blueprint, tensor.pool, tensor.part_in(blueprint), tensor.local)


class LinearKind(TensorKind):
    """The weight matrix of a linear, or a factor of it: fitted, trained and quantised as a matrix."""

    is_fitted = True

    def fill(self, blueprint: Blueprint, tensor: TargetTensor) -> Fill:
        return matrix_fill(blueprint)

    def is_matrix(self, tensor: TargetTensor) -> bool:
        return True

    def is_quantised(self, blueprint: Blueprint, tensor: TargetTensor) -> bool:
        return True


class LinearTensor(LinearKind):
    """The weight of a linear, stored whole."""

    def origin(self, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> Origin:
        assert tensor.pool is not None
        part = tensor.part_in(blueprint)
        found = carry_over(blueprint, starts, tensor.pool, part, tensor.local)
        if found is None:
            return Origin("fresh", f"{tensor.pool}.{tensor.local}")
        if starts.lora == "joint" and is_relaxed(blueprint, tensor.pool, part, tensor.linear):
            carried, _ = found
            layers = tied_layers(blueprint, tensor.pool, part, tensor.local)
            return Origin("joint", carried.canonical, layers, carried.repeat)
        return averaged(*found)

    def explain(self, made: Origin, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> str | None:
        if made.how == "joint":
            return f"stored weight and LoRAs fitted together{describe_weighting(starts)}"
        assert tensor.pool is not None
        kept = kept_units(blueprint, tensor.pool, tensor.part_in(blueprint))
        if not kept or made.how == "fresh":
            return None
        is_refitted = tensor.linear == LAST_LINEARS[tensor.pool] and starts.weight != "none"
        return f"refitted to the kept {kept}{describe_weighting(starts)}" if is_refitted else f"of the kept {kept}"


class FactorTensor(LinearKind):
    """Factor A or B of a linear that is stored as two factors, or the basis A that several depths share."""

    def origin(self, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> Origin:
        assert tensor.pool is not None
        part, local = tensor.part_in(blueprint), f"{tensor.linear}.weight"
        found = carry_over(blueprint, starts, tensor.pool, part, local)
        if found is None:
            return Origin("fresh", f"{tensor.pool}.{local}")
        carried, sources = found
        is_relaxed_jointly = starts.lora == "joint" and is_relaxed(blueprint, tensor.pool, part, tensor.linear)
        if self._is_basis(blueprint, tensor) or is_relaxed_jointly:
            layers = tied_layers(blueprint, tensor.pool, part, local)
            return Origin("joint", carried.canonical, layers, carried.repeat)
        return Origin("factorised", carried.canonical, sources, carried.repeat)

    def fill(self, blueprint: Blueprint, tensor: TargetTensor) -> Fill:
        # The product of two fresh factors then has the variance of a fresh matrix.
        return Fill("normal", tensor.shape[0] ** -0.5) if tensor.local.endswith(".a.weight") else matrix_fill(blueprint)

    def explain(self, made: Origin, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> str | None:
        if made.how == "factorised":
            return describe_svd("the weight", starts)
        if made.how != "joint":
            return None
        together = "basis and coefficients" if self._is_basis(blueprint, tensor) else "stored weight and LoRAs"
        return f"{together} fitted together{describe_weighting(starts)}"

    def line_name(self, tensor: TargetTensor) -> str:
        return tensor.name.rpartition(".")[0] + ".*"

    def _is_basis(self, blueprint: Blueprint, tensor: TargetTensor) -> bool:
        assert tensor.pool is not None
        return tensor.linear in blueprint.pool(tensor.pool)[tensor.part_in(blueprint)].bases


EMBEDDING, HEAD, FINAL_NORM = EmbeddingTensor(), HeadTensor(), FinalNormTensor()
LINEAR, FACTOR, VECTOR = LinearTensor(), FactorTensor(), VectorTensor()
