"""One stored linear with everything its start is fitted from."""

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
        weight: float32 weight of the source layer this depth stands for.
        rank: LoRA rank here; 0: none.
    """

    weight: Float[Tensor, "out in"]
    rank: int


@dataclass(frozen=True)
class LinearGroup:
    """A stored linear, the source weights it is made from and the depths that run it.

    Attributes:
        sources: float32 weights of the part's source layers.
        members: By depth.
        weightings: How errors are weighed; None: every entry alike.
        stored_rank: Rank the stored weight is kept at, as two factors; 0: nothing is stored; None: the whole matrix.
        basis_rank: Rank of the basis where no more than that is stored.
        seed: For random starts; differs between groups.
        dtype: What stored tensors are rounded to when they are written. Pairs correct the rounded ones.
    """

    sources: tuple[Float[Tensor, "out in"], ...]
    members: Mapping[int, Member]
    weightings: GroupWeightings | None = None
    stored_rank: int | None = None
    basis_rank: int | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def round(self, tensor: Tensor) -> Tensor:
        """Returns a float32 tensor as it is read back once it is stored."""
        return tensor.to(self.dtype).float()

    def weighting(self, depth: int) -> Weighting:
        """Returns how an error at one depth is weighed."""
        return Weighting() if self.weightings is None else self.weightings.of(depth)

    def mean(self, weights: Mapping[int, Tensor]) -> Float[Tensor, "out in"]:
        """Returns the one weight that is nearest to those of all depths."""
        if self.weightings is not None:
            return self.weightings.mean(weights)
        total = torch.zeros_like(next(iter(weights.values())))
        for weight in weights.values():
            total += weight / len(weights)
        return total

    def store(self, weight: Float[Tensor, "out in"], svd: SvdMode) -> "Stored":
        """Returns what is stored of a weight all depths share, rounded: itself, or the nearest of the stored rank."""
        if self.stored_rank is None:
            return Stored(self.round(weight))
        if self.stored_rank == 0:
            return Stored(torch.zeros_like(weight), factors=())
        weighting = Weighting() if self.weightings is None else self.weightings.of_all()
        found = weighting.truncate(weight, self.stored_rank, svd, self.seed)
        a, b = (self.round(each) for each in found.factors())
        # In float32 the product of its own, which differs in the last bit, would move what was written before.
        return Stored(found.matrix() if self.dtype == torch.float32 else b @ a, (a, b))


@dataclass(frozen=True)
class Stored:
    """What is stored of a linear.

    Attributes:
        weight: What it computes, float32.
        factors: A and B where it is kept as two; empty where nothing is stored; None: the whole matrix.
    """

    weight: Float[Tensor, "out in"]
    factors: Pair | tuple[()] | None = None


@dataclass(frozen=True)
class Fitted:
    """What a start gives.

    Attributes:
        stored: What is stored.
        pairs: LoRA pair by depth, for members with a rank.
        kept: By depth, the share of the residual's energy (source weight minus stored weight) that the pair holds.
    """

    stored: Stored
    pairs: Mapping[int, Pair] = field(default_factory=dict)
    kept: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Basis:
    """What is stored of a linear whose depths share no more than a basis, and what they keep themselves.

    Attributes:
        a: The basis, float32.
        coefficients: What each depth makes of it, float32.
    """

    a: Float[Tensor, "rank in"]
    coefficients: Mapping[int, Float[Tensor, "out rank"]]

    def weight(self, depth: int) -> Float[Tensor, "out in"]:
        """Returns the weight that is computed at a depth."""
        return self.coefficients[depth] @ self.a

    def rounded(self, group: LinearGroup) -> "Basis":
        """Returns the basis and coefficients as they are read back once they are stored."""
        return Basis(group.round(self.a), {depth: group.round(each) for depth, each in self.coefficients.items()})


@dataclass(frozen=True)
class FittedBasis(Basis):
    """What a start gives where depths share a basis; attributes besides the basis's as of `Fitted`."""

    pairs: Mapping[int, Pair] = field(default_factory=dict)
    kept: Mapping[int, float] = field(default_factory=dict)
