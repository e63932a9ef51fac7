"""The interface of a thing that a depth owns: its tensors, and all that follows from their being there."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal

from refold.blueprint.owned.merge import Merge
from refold.blueprint.schema import Blueprint, Pool
from refold.blueprint.tensor_kind import TargetTensor, TensorKind


class OwnedKind(TensorKind):
    """A kind of tensors that one depth owns. A blueprint says which depths have them; a new kind is one subclass."""

    url: ClassVar[str]
    """Where it is described."""
    column: ClassVar[Literal["rank", "vectors", "exit"]] = "rank"
    """The column of `refold inspect` that shows `describe`."""

    @abstractmethod
    def tensors(self, blueprint: Blueprint, index: int) -> Iterator[TargetTensor]:
        """Yields the tensors of one depth, in the order they are stored."""

    @abstractmethod
    def describe(self, blueprint: Blueprint, index: int) -> str:
        """Returns the size of what one depth has, such as `prefix 4`; empty where it has none."""

    def notes(self, blueprint: Blueprint) -> tuple[str, ...]:
        """Returns the lines of a plan about all depths together."""
        return ()

    def flops(self, blueprint: Blueprint, index: int) -> int:
        """Counts the FLOPs of one token that passes the depth."""
        return 0

    def kept_elements(self, blueprint: Blueprint, index: int) -> int:
        """Counts the numbers in the model's dtype that the depth keeps for all sequences of a cache."""
        return 0

    def merge(self, merge: Merge, blueprint: Blueprint, index: int, pool: Pool, local: str) -> Merge:
        """Returns the merge of a tensor of a part with this depth's tensors included.

        Args:
            merge: The tensor without them.
            blueprint: The stack.
            index: The depth.
            pool: Of the part.
            local: The tensor's name in the part, such as `o_proj.weight`.
        """
        return merge

    def obstacle(self, blueprint: Blueprint) -> tuple[str, str] | None:
        """Returns the property of a stock model that the tensors rule out, and the fact that does; None: none."""
        return None

    def lost(self, blueprint: Blueprint) -> tuple[str, ...]:
        """Returns sentences on what a stock model lacks because it cannot hold the tensors."""
        return ()
