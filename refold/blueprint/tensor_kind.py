"""The base class of tensor kinds, and the description of one target tensor.

A kind is one object for each purpose of tensors (LoRA, norm, gate, ...). It holds every rule that depends on the
purpose, so that no other code asks for a tensor's name.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

from refold.blueprint.initialisation import Initialisation
from refold.blueprint.origins import Origin
from refold.blueprint.schema import Blueprint, Pool
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
    """

    name: str
    shape: Shape
    kind: TensorKind
    pool: Pool | None = None
    part: int | None = None
    depth: int | None = None
    local: str = ""

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
