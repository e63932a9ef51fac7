"""Rules that choose the pass that runs next."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refold.errors import RefoldError
from refold.suggest import must_be_one_of


@dataclass(frozen=True)
class Ready:
    """The spans that could share one launch.

    Attributes:
        num_tokens: Tokens of all of them.
        num_rows: Number of spans.
        oldest: Launches that the one that waits longest has watched.
        ends: Whether the pass ends the stack, so that tokens come out of it.
        begins: Whether the pass begins the stack.
    """

    num_tokens: int
    num_rows: int
    oldest: int
    ends: bool
    begins: bool


class Policy(ABC):
    """Chooses among passes with ready spans."""

    @abstractmethod
    def choose(self, ready: Mapping[Any, Ready]) -> Any:
        """Returns the key of the pass that runs next.

        Args:
            ready: At least one pass; none of them has a span over the bound on waiting.
        """


class Fullest(Policy):
    """The pass with the most tokens; among equals the one whose spans wait longest."""

    def choose(self, ready: Mapping[Any, Ready]) -> Any:
        return max(ready, key=lambda key: (ready[key].num_tokens, ready[key].oldest))


class CodaFirst(Policy):
    """The pass that ends the stack once enough rows are ready for it, because it frees them; else the fullest.

    Args:
        min_rows: Number of rows that are enough.
    """

    def __init__(self, min_rows: int):
        self.min_rows = min_rows

    def choose(self, ready: Mapping[Any, Ready]) -> Any:
        ends = [key for key, found in ready.items() if found.ends and not found.begins]
        enough = [key for key in ends if ready[key].num_rows >= self.min_rows]
        if enough:
            return max(enough, key=lambda key: ready[key].num_rows)
        return Fullest().choose(ready)


class Oldest(Policy):
    """The pass with the span that waits longest; among equals the fullest."""

    def choose(self, ready: Mapping[Any, Ready]) -> Any:
        return max(ready, key=lambda key: (ready[key].oldest, ready[key].num_tokens))


POLICIES = ("fullest", "coda", "oldest")


def make_policy(name: str, min_coda: int) -> Policy:
    """Returns a policy by its name.

    Args:
        name: One of `POLICIES`.
        min_coda: As in `EngineSettings`.

    Raises:
        RefoldError: There is no such policy.
    """
    made = {"fullest": Fullest, "oldest": Oldest}
    if name == "coda":
        return CodaFirst(min_coda)
    if name not in made:
        raise RefoldError(f"policy: {must_be_one_of(name, POLICIES)}")
    return made[name]()


def overdue(waits: Sequence[tuple[Any, int]], bound: int) -> Any | None:
    """Returns the key of the span that has waited longest, if its wait has reached the bound; else None."""
    key, longest = max(waits, key=lambda each: each[1], default=(None, 0))
    return key if longest >= bound else None
