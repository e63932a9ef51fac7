"""The base class of tensor kinds that belong to one depth, such as LoRAs, prefixes and gains."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal

from refold.blueprint.kinds import TargetTensor, TensorKind
from refold.blueprint.owned.merge import Merge
from refold.blueprint.schema import Blueprint, Pool


class OwnedKind(TensorKind):
    """A tensor kind whose tensors belong to one depth. The blueprint selects the depths. A new kind is one subclass."""

    url: ClassVar[str]
    """The paper that describes the kind."""
    field: ClassVar[str]
    """The field of a depth or of a stored part that selects the depths; its default selects none."""
    column: ClassVar[Literal["rank", "vectors", "exit"]] = "rank"
    """The column of `refold inspect` that shows `describe`."""

    @abstractmethod
    def tensors(self, blueprint: Blueprint, index: int) -> Iterator[TargetTensor]:
        """Yields the tensors of one depth, in storage order."""

    @abstractmethod
    def describe(self, blueprint: Blueprint, index: int) -> str:
        """Returns the size of the depth's tensors in words, such as `prefix 4`; empty for a depth without any."""

    def notes(self, blueprint: Blueprint) -> tuple[str, ...]:
        """Returns notes for the plan about all depths together."""
        return ()

    def flops(self, blueprint: Blueprint, index: int) -> int:
        """Counts the FLOPs of one token at the depth."""
        return 0

    def kept_elements(self, blueprint: Blueprint, index: int) -> int:
        """Counts the cached numbers (in the model's dtype) that all sequences of a cache share at the depth."""
        return 0

    def merge(self, merge: Merge, blueprint: Blueprint, index: int, pool: Pool, local: str) -> Merge:
        """Adds the depth's tensors to the merge of one weight of a part.

        Args:
            merge: The merge so far.
            blueprint: The stack.
            index: The depth.
            pool: The pool of the part.
            local: The weight's name in the part, such as `o_proj.weight`.
        """
        return merge

    def obstacle(self, blueprint: Blueprint) -> tuple[str, str] | None:
        """Returns the property that a stock model lacks for these tensors, and the reason; None: no obstacle."""
        return None

    def lost(self, blueprint: Blueprint) -> tuple[str, ...]:
        """Returns sentences about the tensors that an export to a stock model drops."""
        return ()
