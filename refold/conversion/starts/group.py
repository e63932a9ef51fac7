"""A stored linear, with the weights and settings that its initialisation is fitted from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from refold.calibration.curves import GroupWeightings
from refold.calibration.svd import SvdMode
from refold.calibration.weighting import Weighting
from refold.nn.lora import Pair


@dataclass(frozen=True)
class Member:
    """A depth that runs the stored linear.

    Attributes:
        weight: float32 weight of the source layer that the depth replaces.
        rank: LoRA rank at the depth; 0: no LoRA.
    """

    weight: Float[Tensor, "out in"]
    rank: int


@dataclass(frozen=True)
class LinearGroup:
    """A stored linear, the source weights it is made from, and the depths that run it.

    Attributes:
        sources: float32 weights of the part's source layers.
        members: The depths that run it, by index.
        weightings: Weightings of errors; None: the Frobenius norm.
        stored_rank: Rank of the stored weight, kept as two factors; 0: nothing is stored; None: the whole matrix.
        basis_rank: Rank of the basis if only a basis is stored.
        seed: Seed of random initialisation; differs between groups.
        dtype: Dtype of the stored tensors. LoRA pairs also correct the rounding to it.
    """

    sources: tuple[Float[Tensor, "out in"], ...]
    members: Mapping[int, Member]
    weightings: GroupWeightings | None = None
    stored_rank: int | None = None
    basis_rank: int | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def round(self, tensor: Tensor) -> Tensor:
        """Returns a float32 tensor rounded to the stored dtype."""
        return tensor.to(self.dtype).float()

    def weighting(self, depth: int) -> Weighting:
        """Returns the weighting of errors at one depth."""
        return Weighting() if self.weightings is None else self.weightings.of(depth)

    def mean(self, weights: Mapping[int, Tensor]) -> Float[Tensor, "out in"]:
        """Returns the weight that is nearest to the weights of all depths."""
        if self.weightings is not None:
            return self.weightings.mean(weights)
        total = torch.zeros_like(next(iter(weights.values())))
        for weight in weights.values():
            total += weight / len(weights)
        return total

    def store(self, weight: Float[Tensor, "out in"], svd: SvdMode) -> "Stored":
        """Returns the stored form of a shared weight, rounded: the whole matrix, or the nearest of the stored rank."""
        if self.stored_rank is None:
            return Stored(self.round(weight))
        if self.stored_rank == 0:
            return Stored(torch.zeros_like(weight), factors=())
        weighting = Weighting() if self.weightings is None else self.weightings.of_all()
        found = weighting.truncate(weight, self.stored_rank, svd, self.seed)
        a, b = (self.round(each) for each in found.factors())
        # In float32 `b @ a` differs from the matrix in the last bit, and folders written before used the matrix.
        return Stored(found.matrix() if self.dtype == torch.float32 else b @ a, (a, b), found.kept)


@dataclass(frozen=True)
class Stored:
    """Stored form of a linear.

    Attributes:
        weight: The weight that it computes with, float32.
        factors: A and B if the weight is kept as two factors; empty if nothing is stored; None: the whole matrix.
        kept: Share of the weight's energy, in the metric of errors, that the factors hold; 1 without factors.
    """

    weight: Float[Tensor, "out in"]
    factors: Pair | tuple[()] | None = None
    kept: float = 1.0


@dataclass(frozen=True)
class Fitted:
    """Result of an initialisation.

    Attributes:
        stored: Stored form of the linear.
        pairs: LoRA pair by depth, for members with a rank.
        kept: By depth, the share of the residual's energy (source weight minus stored weight) that the pair holds.
    """

    stored: Stored
    pairs: Mapping[int, Pair] = field(default_factory=dict)
    kept: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Basis:
    """A basis that all depths share, and the coefficients that each depth keeps itself.

    Attributes:
        a: The basis, float32.
        coefficients: By depth, the matrix that the basis is multiplied by, float32.
    """

    a: Float[Tensor, "rank in"]
    coefficients: Mapping[int, Float[Tensor, "out rank"]]

    def weight(self, depth: int) -> Float[Tensor, "out in"]:
        """Returns the weight at a depth."""
        return self.coefficients[depth] @ self.a

    def rounded(self, group: LinearGroup) -> "Basis":
        """Returns basis and coefficients rounded to the stored dtype."""
        return Basis(group.round(self.a), {depth: group.round(each) for depth, each in self.coefficients.items()})


@dataclass(frozen=True)
class FittedBasis(Basis):
    """Result of an initialisation with a shared basis; `pairs` and `kept` are those of `Fitted`."""

    pairs: Mapping[int, Pair] = field(default_factory=dict)
    kept: Mapping[int, float] = field(default_factory=dict)
