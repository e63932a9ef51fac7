"""One stored linear with everything its start is fitted from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

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
        seed: For random starts; differs between groups.
    """

    sources: tuple[Float[Tensor, "out in"], ...]
    members: Mapping[int, Member]
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """What a start gives.

    Attributes:
        stored: float32 weight of the stored linear.
        pairs: LoRA pair by depth, for members with a rank.
        kept: By depth, the share of the residual's energy (source weight minus stored weight) that the pair holds.
    """

    stored: Float[Tensor, "out in"]
    pairs: Mapping[int, Pair] = field(default_factory=dict)
    kept: Mapping[int, float] = field(default_factory=dict)
