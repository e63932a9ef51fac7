"""Kinds of tensors of a target: everything that depends on the purpose of a tensor, in one object for each purpose."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

from refold.blueprint.initialisation import Initialisation
from refold.blueprint.origins import Origin
from refold.blueprint.schema import Blueprint, Pool
from refold.mixers.spec import Fill, Shape

Place = Literal["embedding", "head", "final_norm", "stack", "exits"]
"""Where parameters are counted."""


class TensorKind(ABC):
    """Answers every question about tensors of one purpose: origin, fresh values, training, cost and plan text."""

    place: ClassVar[Place] = "stack"
    groups: ClassVar[frozenset[str]] = frozenset()
    """Groups of a heal stage that the tensors belong to, besides those of their pool."""
    is_fitted: ClassVar[bool] = False
    """Whether the tensors are computed from a linear of the source, with everything that shares the linear."""

    @abstractmethod
    def origin(self, blueprint: Blueprint, starts: Initialisation, tensor: "TargetTensor") -> Origin:
        """Returns the source layers and the method that a tensor is initialised with."""

    @abstractmethod
    def fill(self, blueprint: Blueprint, tensor: "TargetTensor") -> Fill:
        """Returns the values of a fresh tensor."""

    def explain(self, made: Origin, blueprint: Blueprint, starts: Initialisation, tensor: "TargetTensor") -> str | None:
        """Returns the reason of a plan line; None where the way the source stores the tensor gives it."""
        return None

    def line_name(self, tensor: "TargetTensor") -> str:
        """Returns the name under which a plan line lists a tensor; `*` stands for the tensors that form one group."""
        return tensor.name

    def is_matrix(self, tensor: "TargetTensor") -> bool:
        """Says whether Muon updates the tensor: a matrix between embedding and head."""
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
        name: As in the model folder, such as `model.mixers.0.q_proj.weight`.
        shape: Its shape.
        kind: Its purpose.
        pool: `mixer` or `mlp` for tensors of a part and for those that a depth owns beside a part.
        part: Index of the stored part; None for tensors of a depth.
        depth: Index of the depth that owns it; None for tensors of a part or outside the stack.
        local: Name inside its part, such as `q_proj.weight` or `input_norm.weight`; of LoRA and coefficients the
            linear's, `q_proj`; of an exit the name inside the exit, such as `lora.lm_head.a`.
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
        """The linear that a weight, factor, LoRA or coefficient tensor belongs to, such as `q_proj`."""
        return self.local.split(".")[0]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def groups(self) -> frozenset[str]:
        """Groups of a heal stage, such as `mixers` and `adapters`."""
        return self.kind.groups | (frozenset() if self.pool is None else {f"{self.pool}s"})

    def part_in(self, blueprint: Blueprint) -> int:
        """Returns the stored part that the tensor belongs to, or that the depth owning it runs."""
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
        """Returns the values of the tensor where it is fresh."""
        return self.kind.fill(blueprint, self)
