"""The interface between mixers and caches: a store has a memory for each depth."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from refold.errors import RefoldError
from refold.nn.mixers.key_values import KeyValue


class Appended(NamedTuple):
    """Keys and values after a call's own were appended.

    Attributes:
        key: `[B, G, S, K]` of all S tokens that are attended to.
        value: Likewise.
        extra: Arguments of the attention back-end; a paged cache adds its own for this depth.
    """

    key: Tensor
    value: Tensor
    extra: Mapping[str, Any]


class StorePart(NamedTuple):
    """Neighbouring rows of a batch that stand at one depth.

    Attributes:
        depth: Where they stand.
        rows: Of the batch.
        adapters: Number of the adapters that made the depth's prefix; 0: the model's own.
    """

    depth: int
    rows: slice
    adapters: int = 0


class Memory(ABC):
    """One depth's keys and values, or recurrent state and last inputs, between calls.

    Attributes:
        attends: Whether it computes attention itself. `append` then returns the keys and values it was given, and keys
            of earlier depths are read from the memory instead of passing from depth to depth.
    """

    attends: ClassVar[bool] = False

    def attend(self, view: nn.Module, query: Float[Tensor, "B H T K"]) -> Float[Tensor, "B T H K"]:
        """Attends to all keys and values of this depth's heads, and to the prefix that `once` has made.

        Args:
            view: The attention of the depth, with its scale, window and soft-cap.
            query: Of this call's tokens, whose keys have been appended.
        """
        raise NotImplementedError(f"{type(self).__name__} does not compute attention")

    @abstractmethod
    def append(
        self, key: Float[Tensor, "B G T K"], value: Float[Tensor, "B G T K"], extra: Mapping[str, Any]
    ) -> Appended:
        """Appends keys and values and returns those of all tokens.

        Args:
            key: Of this call's tokens.
            value: Of this call's tokens.
            extra: Arguments of the attention back-end, which are not changed.
        """

    @abstractmethod
    def state(self) -> Tensor | None:
        """Returns the recurrent state that earlier calls left, or None."""

    @abstractmethod
    def keep_state(self, state: Tensor) -> None:
        """Keeps the recurrent state after this call's last token."""

    @abstractmethod
    def exchange(
        self, inputs: Float[Tensor, "B T C"], width: int, resets: Bool[Tensor, "B T"] | None
    ) -> Float[Tensor, "B W C"] | None:
        """Returns the `width` inputs before these, oldest first, and keeps the last `width` of all.

        Zeros fill the places before the first input. In the kept inputs, zeros also replace those of earlier documents.
        Returns None if there were no inputs before.
        """

    @abstractmethod
    def once(self, make: Callable[[], KeyValue]) -> KeyValue:
        """Returns keys and values that depend on weights alone; a store that outlives the call makes them once."""


class Store(ABC):
    """The memories of all depths for the rows of a batch. Engines with pools of their own implement it."""

    @abstractmethod
    def memory(self, depth: int, adapters: int = 0) -> Memory:
        """Returns the memory of one depth, for all rows.

        Args:
            depth: Which.
            adapters: Number of the adapters with which all rows run the depth; 0: the model's own.
        """

    def row_memory(self, parts: Sequence[StorePart]) -> Memory:
        """Returns the memory of rows that stand at several depths, or run one depth with several adapters.

        Args:
            parts: All rows, in order.

        Raises:
            RefoldError: The store keeps rows of one depth together.
        """
        raise RefoldError(
            f"store: rows at several depths need a store with memory for each row (got {type(self).__name__}); run "
            f"each depth's rows by themselves"
        )


class NothingKept(Memory):
    """The memory of a pass without a cache: all tokens are in this call."""

    def append(self, key: Tensor, value: Tensor, extra: Mapping[str, Any]) -> Appended:
        return Appended(key, value, extra)

    def state(self) -> Tensor | None:
        return None

    def keep_state(self, state: Tensor) -> None:
        pass

    def exchange(self, inputs: Tensor, width: int, resets: Tensor | None) -> Tensor | None:
        return None

    def once(self, make: Callable[[], KeyValue]) -> KeyValue:
        return make()


NOTHING_KEPT = NothingKept()
